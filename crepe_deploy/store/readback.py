"""Weight files read once, from the first byte to the last, for everything that has to be known of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from crepe_deploy.errors import CheckpointError, ParityError

from .checkpoint import CheckpointReader, TensorInfo, bytes_of, fingerprint, read_exactly


class ReadBack:
    """The tensors of a checkpoint folder in file order, one in memory at a time, and each file's hash on the way.

    hashes: hex sha256 by file name, of every file that has been read to its end. Raises CheckpointError.
    """

    def __init__(self, root: Path) -> None:
        self.reader = CheckpointReader(root)
        self.hashes: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[TensorInfo, Tensor]]:
        for path in self.reader.files:
            infos = [info for info in self.reader if info.file == path]
            infos.sort(key=lambda info: (info.offset, info.size_bytes))
            digest = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    digest.update(file.read(infos[0].offset) if infos else file.read())
                    for info in infos:
                        tensor = _next(file, info)
                        if info.size_bytes:
                            digest.update(bytes_of(tensor))
                        yield info, tensor
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            self.hashes[path.name] = digest.hexdigest()


def _next(file: BinaryIO, info: TensorInfo) -> Tensor:
    """The tensor that lies next in an open file: a checked header leaves no holes."""
    tensor = torch.empty(info.shape, dtype=info.dtype)
    if info.size_bytes:
        read_exactly(file, bytes_of(tensor), info)
    return tensor


def prove_written(
    root: Path, fingerprints: Mapping[str, str], tick: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Read back what a `CheckpointWriter` wrote into `root`; sha256 by file. A tick for each tensor.

    fingerprints: the writer's. Raises ParityError naming a tensor whose bits on disk are not those that were written.
    """
    files = ReadBack(root)
    for info, tensor in files:
        check_fingerprint(root, info.name, tensor, fingerprints)
        tick()
    return files.hashes


def check_fingerprint(root: Path, name: str, tensor: Tensor, fingerprints: Mapping[str, str]) -> None:
    """Raise ParityError unless `tensor`, as read back, has the bits that were written."""
    if fingerprint(tensor) != fingerprints.get(name):
        raise ParityError(f"{root}: '{name}' on disk holds other bits than were written")
