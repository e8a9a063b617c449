"""The headers of a GGUF file without its weights: copies that end in a hole, for readers that want whole files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from crepe_deploy.errors import CheckpointError

from .files import disk_errors
from .gguf import damage_named, need
from .gguf_header import Header, check_header
from .gguf_split import check_parts, parts_of
from .reading import open_file
from .temporary import temporary_folder

MOST_BYTES: Final = 1 << 42  # of weights; more than any model has
_SPARE: Final = 1 << 16  # between header and data, where a file aligns it


@dataclass(frozen=True)
class Headers:
    """What the headers of all parts hold. path: as given. copies: of the parts, without data. readers: gguf's, of the
    copies. whole: whether the files are as long as their headers say. stretched: whether what stretches rotary
    embeddings, which is no weight, could be read."""

    path: Path
    copies: list[Path]
    readers: list[Any]
    whole: bool
    stretched: bool

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return [tensor.name for reader in self.readers for tensor in reader.tensors]


@contextmanager
def headers_of(path: Path) -> Iterator[Headers]:
    """Inside, there are copies of the headers of all parts; no byte of a weight is read.

    Raises CheckpointError, MissingExtra, DiskFullError, OutputError.
    """
    parts = parts_of(path)
    headers = [check_header(part) for part in parts]
    need("gguf")
    with temporary_folder("gguf") as folder:
        copies = [folder / part.name for part in parts]
        for part, header, copy in zip(parts, headers, copies, strict=True):
            _copy(part, header, copy)
        readers = [_reader(part, copy) for part, copy in zip(parts, copies, strict=True)]
        check_parts(parts, readers)
        ends = [max(int(one.data_offset) + int(one.n_bytes) for one in reader.tensors) for reader in readers]
        whole = all(part.stat().st_size >= end for part, end in zip(parts, ends, strict=True))
        stretched = all(
            _fill_rope(part, reader, copy) for part, reader, copy in zip(parts, readers, copies, strict=True)
        )
        yield Headers(path, copies, readers, whole, stretched)


def _copy(part: Path, header: Header, copy: Path) -> None:
    """The header, and a hole as large as the data."""
    size = header.size + _SPARE + _data_bytes(part, header)
    with disk_errors(copy), open_file(part) as source, copy.open("wb") as target:
        target.write(source.read(header.size))
        target.truncate(size)


def _data_bytes(part: Path, header: Header) -> int:
    """How far the data goes that the table of tensors describes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if not header.tensors:
        raise CheckpointError(f"{part} holds no tensors")
    end = 0
    for tensor in header.tensors:
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{part} is damaged, or newer than the installed gguf: tensor '{tensor.name}' is of type {tensor.kind}"
            ) from error
        end = max(end, tensor.offset + math.prod(tensor.shape) // block * size)
    if end > MOST_BYTES:
        raise CheckpointError(f"{part} is damaged: its tensors end at byte {end}; download it again")
    return end


def _reader(part: Path, copy: Path) -> Any:
    from gguf import GGUFReader

    with damage_named(part):
        return GGUFReader(str(copy))


def _fill_rope(part: Path, reader: Any, copy: Path) -> bool:
    """Put into the hole what stretches rotary embeddings; whether the file is long enough to have it."""
    with open_file(part) as source, copy.open("r+b") as target:
        for tensor in reader.tensors:
            if tensor.name.startswith("rope_"):
                source.seek(int(tensor.data_offset))
                data = source.read(int(tensor.n_bytes))
                if len(data) < int(tensor.n_bytes):
                    return False
                target.seek(int(tensor.data_offset))
                target.write(data)
    return True
