"""The dense model in training: what its blocks gave for a window is kept on disk, for windows come again.

Kept are the states behind the last norm, a few numbers a token where logits are a whole vocabulary; the head is run on
them again, on batches of the size that they came from, so logits are to the bit what the whole model gives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from crepe_deploy.store.files import disk_errors

MOST_BYTES: Final = 2 << 30  # on disk; what would be more is computed anew each time


def kept_windows(windows: int, held: int, window_bytes: int) -> int:
    """Of how many windows the states are kept: of all, of those held out alone, or of none."""
    return next((count for count in (windows, held) if count * window_bytes <= MOST_BYTES), 0)


class Teacher:
    """A loaded model. work: a folder on whose disk states are kept, in a file without a name, gone with the process.

    windows: of how many they are kept, the first ones by number.
    """

    def __init__(self, model: Any, work: Path, windows: int) -> None:
        self.model = model
        self._work, self._windows = work, windows
        self._known: set[int] = set()
        self._file: FileIO | None = None
        self._shell: Any = None  # what the model's base returned, without the states

    @torch.no_grad()
    def logits(self, tokens: Tensor, numbers: Sequence[int]) -> Tensor:
        """Logits (windows * length, vocabulary) of `tokens` (windows, length). numbers: of the windows.

        Raises DiskFullError.
        """
        if self._shell is not None and self._known.issuperset(numbers):
            states = torch.stack([self._read(number) for number in numbers]).to(tokens.device)
            with _returning(self.model.base_model, dataclasses.replace(self._shell, last_hidden_state=states)):
                return self._run(tokens)
        with self._noting(numbers):
            return self._run(tokens)

    def close(self) -> None:
        """Keep nothing any longer."""
        self._known.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _run(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits.flatten(0, 1)

    @contextlib.contextmanager
    def _noting(self, numbers: Sequence[int]) -> Iterator[None]:
        """Inside, what the base of the model gives is kept; nothing of a model that is not a base and a head."""
        base = self.model.base_model
        if base is self.model or max(numbers) >= self._windows:
            yield
            return
        hook = base.register_forward_hook(lambda _module, _given, output: self._keep(output, numbers))
        try:
            yield
        finally:
            hook.remove()

    def _keep(self, output: Any, numbers: Sequence[int]) -> None:
        states = getattr(output, "last_hidden_state", None)
        if not isinstance(states, Tensor) or not dataclasses.is_dataclass(output):
            return
        self._shell = dataclasses.replace(output, last_hidden_state=None)  # type: ignore[type-var]
        self._like = states[0].cpu()
        with disk_errors(self._work):
            self._file = self._file or tempfile.TemporaryFile(dir=self._work, buffering=0)  # noqa: SIM115
            for number, window in zip(numbers, states.cpu(), strict=True):
                self._file.seek(number * self._size)
                left = window.contiguous().view(torch.uint8).numpy().data.cast("B")
                while left:
                    left = left[self._file.write(left) :]
        self._known.update(numbers)

    def _read(self, number: int) -> Tensor:
        assert self._file is not None
        window = torch.empty_like(self._like)
        with disk_errors(self._work):
            self._file.seek(number * self._size)
            self._file.readinto(window.view(torch.uint8).numpy().data)
        return window

    @property
    def _size(self) -> int:
        """Bytes of a window's states."""
        return self._like.numel() * self._like.itemsize


@contextlib.contextmanager
def _returning(module: Any, output: Any) -> Iterator[None]:
    """Inside, `module` computes nothing and returns this."""
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward
