"""What a stopped measurement goes on from: the layers that are done, and the hidden states behind the last of them.

Unlike those of a pruning run, hidden states cannot be had again for less than a measurement: metered experts add up in
another order than the model's own. So those behind the last two layers are kept in the work folder, hashed in the
journal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crepe_deploy.errors import VerifyError
from crepe_deploy.model.calibrate import Stream
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.store.files import disk_errors
from crepe_deploy.store.journal import Journal
from crepe_deploy.store.manifest import sha256_file

KIND: Final = "layer"
STATES: Final = 2  # files of hidden states: while one is written, the one before it is whole


@dataclass(frozen=True)
class Kept:
    """The layers that are measured, in the journal of a run and the files beside it."""

    journal: Journal
    work: Path

    def room(self, decoder: Decoder, tokens: Tensor) -> int:
        """The bytes that hidden states of tokens (samples, length) will take."""
        return STATES * tokens.numel() * int(decoder.config.hidden_size) * decoder.dtype.itemsize

    def note(self, index: int, stats: Mapping[str, Tensor], stream: Stream) -> None:
        """Layer `index` is measured, what it gave is `stream`. stats: empty without experts. Raises DiskFullError."""
        hidden = {str(number): batch.contiguous().cpu() for number, batch in enumerate(stream.hidden)}
        for path, tensors in ((self._stats(index), stats), (self._hidden(index), hidden)):
            with disk_errors(path):
                save_file(dict(tensors), path)
        self.journal.add(KIND, str(index), {path.name: sha256_file(path) for path in self._files(index)})

    def last(self, count: int) -> int:
        """The newest of `count` layers behind which the files hold what was noted; -1 for none. Raises ConfigError."""
        return next((index for index in reversed(range(count)) if self._holds(index)), -1)

    def stats(self, index: int) -> dict[str, Tensor]:
        """Of a layer that `last` has found, or of one before it. Raises VerifyError."""
        return _load(self._stats(index))

    def restore(self, index: int, stream: Stream) -> None:
        """Put the hidden states behind layer `index`, which `last` has found, into `stream`. Raises VerifyError."""
        found = _load(self._hidden(index))
        for number, batch in enumerate(stream.hidden):
            stream.hidden[number] = found[str(number)].to(batch.device)

    def _holds(self, index: int) -> bool:
        noted: dict[str, str] = {}
        for number in range(index + 1):
            names = {path.name for path in self._files(number)}
            entry = self.journal.get(KIND, str(number), partial(_are_files, names=names))
            if entry is None:
                return False
            noted |= entry
        paths = [self._hidden(index), *map(self._stats, range(index + 1))]
        return all(path.is_file() and sha256_file(path) == noted[path.name] for path in paths)

    def _files(self, index: int) -> tuple[Path, Path]:
        return self._stats(index), self._hidden(index)

    def _stats(self, index: int) -> Path:
        return self.work / f"layer-{index}.safetensors"

    def _hidden(self, index: int) -> Path:
        return self.work / f"hidden-{index % STATES}.safetensors"


def _load(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise VerifyError(f"{path} cannot be read: {error}") from error


def _are_files(value: Any, names: Collection[str]) -> bool:
    """Whether it is a sha256 for each of these files."""
    return (
        isinstance(value, dict)
        and value.keys() == set(names)
        and all(isinstance(digest, str) for digest in value.values())
    )
