"""Reading ahead: the next block's weights come from the disk while a GPU computes with the present one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class ReadAhead:
    """What one thread has read, or is reading, by name; each is given once."""

    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _read: dict[str, Future[Tensor]] = field(default_factory=dict)

    def start(self, names: Sequence[str], load: Callable[[str], Tensor]) -> None:
        """Read these in place of what was read before and nobody asked for."""
        for future in self._read.values():
            future.cancel()
        self._read = {name: self._pool.submit(load, name) for name in names}

    def get(self, name: str, load: Callable[[str], Tensor]) -> Tensor:
        """The tensor, read now where it was not ahead. Raises what `load` raises."""
        future = self._read.pop(name, None)
        return load(name) if future is None else future.result()
