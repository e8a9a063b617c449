"""`Tuner`: measures each shape and batch once, remembers the times on disk, and chooses by one rule.

A dispatcher has one. It names its choices: `dense` reads a dense copy that the layer keeps, `expand` makes one for the
call, and whatever else it has multiplies by packed weights. What follows a blank in a name configures the choice.
Batch sizes share a bucket up to the next power of two; a key ends with its bucket: `.../bucket3`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from . import measurements
from .measurements import Machine, Times

TUNE_VARIABLE: Final = "CREPE_DEPLOY_TUNE"


def tuning_allowed() -> bool:
    """Whether the user lets kernels be measured: not with `CREPE_DEPLOY_TUNE=0`."""
    return os.environ.get(TUNE_VARIABLE, "1") != "0"


def bucket_of(tokens: int, count: int) -> int:
    """The bucket of a batch of `tokens` rows: 0 for 1, 1 for 2, 2 for 3-4, 3 for 5-8, ... the last of `count` for all
    above."""
    return min(max(tokens - 1, 0).bit_length(), count - 1)


@dataclass
class Tuner:
    """The measurements of one kind of device, and how a choice follows from them.

    machine     what a measurement is valid for; asked when first needed
    known       whether a name is that of a choice
    order       kinds of choices, what allocates least first
    tie         within this factor of the best, which noise may make of nothing, the order decides
    dense_gain  a dense copy is worth its memory below this fraction of the best packed time
    """

    machine: Callable[[], Machine]
    known: Callable[[str], bool]
    order: tuple[str, ...]
    tie: float
    dense_gain: float
    _measured: dict[str, Times] | None = field(default=None, init=False)
    _chosen: dict[tuple[str, Hashable], str | None] = field(default_factory=dict, init=False)

    @property
    def measured(self) -> Mapping[str, Times]:
        """Milliseconds of each choice, by key: all that this process knows; the file is read once."""
        if self._measured is None:
            self._measured = measurements.read(self.path(), self.machine(), self.known)
        return self._measured

    def path(self) -> Path:
        """The file of this machine's measurements, in the user's cache."""
        return measurements.path_of(self.machine())

    def times(self, wanted: Mapping[str, Callable[[], Times]]) -> dict[str, Times]:
        """The times of these keys; those that are not known are measured by their function and remembered."""
        new = {key: measure() for key, measure in wanted.items() if key not in self.measured}
        if new:
            self.remember(new)
        return {key: self.measured[key] for key in wanted}

    def remember(self, new: Mapping[str, Times]) -> None:
        """Add measurements to this process and to the file, in one atomic step; a read-only cache is no error."""
        self._measured = {**self.measured, **new}
        self._chosen.clear()
        measurements.add(self.path(), self.machine(), self.known, new)

    def reread(self) -> None:
        """Forget what this process has read, not the file."""
        self._measured = None
        self._chosen.clear()

    def forget(self) -> Path:
        """Drop all measurements of this machine; returns their file. Plans that layers hold stay until they are loaded
        again."""
        path = self.path()
        path.unlink(missing_ok=True)
        self.reread()
        return path

    def fastest(self, times: Times, keep_dense: bool = False) -> str:
        """The fastest choice; among near-equals the kind that allocates least; `dense` only if allowed and clearly
        best."""
        packed = {name: ms for name, ms in times.items() if name != "dense"}
        if "expand" in packed:  # it contains the dense product: measured below that, it is noise
            packed["expand"] = max(packed["expand"], times.get("dense", 0.0))
        best = min(packed.values())
        if keep_dense and times.get("dense", best) < self.dense_gain * best:
            return "dense"
        near = [name for name, ms in packed.items() if ms <= self.tie * best]
        return min(near, key=lambda name: (self.order.index(name.partition(" ")[0]), packed[name]))

    def choice(self, key: str, holds: Hashable, usable: Callable[[str], bool], keep_dense: bool) -> str | None:
        """The fastest measured choice that a layer can run, or None where none was measured but `dense`.

        holds: what decides, beside the key, which choices are usable and whether dense is; asked once for each.
        """
        asked = key, holds
        if asked not in self._chosen:
            times = {name: ms for name, ms in self.measured.get(key, {}).items() if usable(name)}
            self._chosen[asked] = self.fastest(times, keep_dense) if times.keys() - {"dense"} else None
        return self._chosen[asked]

    def entries(self) -> list[tuple[list[str], dict[str, Any]]]:
        """Every measurement: the parts of its key before the bucket, and its largest batch, the choice and how many
        times as fast as dense that is."""
        entries = []
        for key, times in sorted(self.measured.items()):
            *parts, bucket = key.split("/")
            choice = self.fastest(times)
            entry = {
                "batch": 1 << int(bucket.removeprefix("bucket")),
                "choice": choice,
                "gain_over_dense": times["dense"] / times[choice] if "dense" in times else None,
            }
            entries.append((parts, entry))
        return entries
