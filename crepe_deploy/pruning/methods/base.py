"""What a pruning method is: a frozen dataclass of hyperparameters around a pure tensor function.

`needs` names the statistics it reads. `feed` is whose output calibrates the next block unless the user says: the dense
block's (one pass) or the pruned one's (two passes), whichever kept more of a real model (docs/methods.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.limits import MOST_WHOLE
from crepe_deploy.model.stats import Need, Stats
from crepe_deploy.pattern import Pattern

Feed = Literal["dense", "pruned", "both"]


@runtime_checkable
class ScoreMethod(Protocol):
    """Scores every weight; mask selection is a separate step (`select.py`)."""

    needs: ClassVar[frozenset[Need]]
    feed: ClassVar[Feed]

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """`weight` (out, in), any float dtype -> fp32 score (out, in), higher = keep. Does not mutate."""
        ...


@dataclass(frozen=True)
class Solution:
    """A mask (out, in) bool, True = keep, and the updated weight (out, in) fp32, zero where pruned.

    notes: what the manifest must record, for example the damping that was needed.
    """

    weight: Tensor
    mask: Tensor
    notes: dict[str, float]


@runtime_checkable
class SolveMethod(Protocol):
    """Chooses the mask and updates the kept weights together."""

    needs: ClassVar[frozenset[Need]]
    feed: ClassVar[Feed]

    def solve(self, weight: Tensor, stats: Stats, pattern: Pattern) -> Solution:
        """`weight` (out, in), any float dtype. Does not mutate its arguments. Raises NumericalError."""
        ...


def check_range(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless the hyperparameter `value` is a finite number with low <= value <= high."""
    number = (type(value) is int and abs(value) <= MOST_WHOLE) or (isinstance(value, float) and math.isfinite(value))
    if not number or not low <= value <= high:  # type: ignore[operator]  # `number` narrows no type
        limits = f">= {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ConfigError(f"{name} is {value!r}; it must be a number {limits}")
