"""What a pruning method is: a frozen dataclass of hyperparameters around a pure tensor function.

`needs` names the statistics it reads. `feed` is whose output calibrates the next block unless the user says: the dense
block's (one pass) or the pruned one's (two passes), whichever kept more of a real model (docs/methods.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from crepe_deploy.errors import CalibrationError, ConfigError
from crepe_deploy.pattern import Pattern

Need = Literal["col_norm", "hessian", "moments"]
Feed = Literal["dense", "pruned", "both"]


@dataclass(frozen=True)
class Stats:
    """Statistics of one linear layer's input over the calibration tokens; only what the method `needs` is set.

    col_norm: (in,) fp32, ||X_j||_2 with ||X_j||^2 averaged over calibration sequences.
    hessian: (in, in) fp32, (2/n) * sum over the n calibration sequences of X^T X.
    total, variance ("moments"): (in,) fp32, the sum of X_j over a sequence's tokens, averaged over the sequences, and
        the variance of X_j over all tokens.
    cross: (in, in) fp32, (2/n) * sum of D^T X, where D is the same input in the dense model and X the one that this
        layer gets behind pruned layers; what the layer should then put out is D W^T. None where D is X.
    drift: (out, in) fp32, (2/n) * sum of R^T X, where R is what the residual stream to which the layer adds its output
        has lost so far, dense less pruned; None where the layer is not to make up for it.
    memo: what a method derived from these statistics, so that layers which share one input (q, k and v; gate and up)
        share the work when they are given the same `Stats`. It must not be reused once the tensors change.
    """

    col_norm: Tensor | None = None
    hessian: Tensor | None = None
    total: Tensor | None = None
    variance: Tensor | None = None
    cross: Tensor | None = None
    drift: Tensor | None = None
    memo: dict[object, object] = field(default_factory=dict, init=False, repr=False, compare=False)


def reorder_stats(stats: Stats, order: Tensor) -> Stats:
    """The statistics of an input whose channel i was channel order[i]."""
    vectors = {name: getattr(stats, name) for name in ("col_norm", "total", "variance")}
    return Stats(
        hessian=None if stats.hessian is None else stats.hessian[order][:, order],
        cross=None if stats.cross is None else stats.cross[order][:, order],
        drift=None if stats.drift is None else stats.drift[:, order],
        **{name: None if vector is None else vector[order] for name, vector in vectors.items()},
    )


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


def need_col_norm(stats: Stats, weight: Tensor) -> Tensor:
    """`stats.col_norm` (in,) as fp32 on the weight's device. Raises CalibrationError if it is missing or misshapen."""
    return _need(stats.col_norm, "col_norm", (weight.shape[1],)).to(weight.device, torch.float32)


def need_hessian(stats: Stats, weight: Tensor) -> Tensor:
    """`stats.hessian` (in, in) on the weight's device. Raises CalibrationError if it is missing or misshapen."""
    return _need(stats.hessian, "hessian", (weight.shape[1], weight.shape[1])).to(weight.device)


def need_moments(stats: Stats, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`stats.total` and `stats.variance`, both (in,), on the weight's device. Raises CalibrationError as the others."""
    shape = (weight.shape[1],)
    total, variance = _need(stats.total, "moments", shape), _need(stats.variance, "moments", shape)
    return total.to(weight.device), variance.to(weight.device)


def check_range(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless the hyperparameter `value` is a finite number with low <= value <= high."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:  # type: ignore[operator]  # `number` narrows no type
        limits = f">= {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ConfigError(f"{name} is {value!r}; it must be a number {limits}")


def _need(value: Tensor | None, name: str, shape: tuple[int, ...]) -> Tensor:
    if value is None:
        raise CalibrationError(f"the method needs the calibration statistic '{name}', which was not collected")
    if value.shape != shape:
        raise CalibrationError(f"the calibration statistic '{name}' is {tuple(value.shape)}, the weight needs {shape}")
    return value
