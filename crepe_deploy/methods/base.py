"""What a pruning method is: a frozen dataclass of hyperparameters around a pure tensor function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from ..pattern import Pattern

Need = Literal["col_norm", "hessian"]


@dataclass(frozen=True)
class Stats:
    """Statistics of one linear layer's input over the calibration tokens; only what the method `needs` is set.

    col_norm: (in,) fp32, ||X_j||_2 with ||X_j||^2 averaged over calibration sequences.
    hessian: (in, in) fp32, (2/n) * sum over the n calibration sequences of X^T X.
    """

    col_norm: Tensor | None = None
    hessian: Tensor | None = None


@runtime_checkable
class ScoreMethod(Protocol):
    """Scores every weight; mask selection is a separate step (`select.py`)."""

    needs: ClassVar[frozenset[Need]]

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

    def solve(self, weight: Tensor, stats: Stats, pattern: Pattern) -> Solution:
        """`weight` (out, in), any float dtype. Does not mutate its arguments. Raises NumericalError."""
        ...
