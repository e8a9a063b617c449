"""What calibration tells of a linear layer's input: the statistics that methods and steps read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from crepe_deploy.errors import CalibrationError

Need = Literal["col_norm", "hessian", "moments"]
Derived = TypeVar("Derived")


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

    def derived(self, key: tuple[object, ...], compute: Callable[[], Derived]) -> Derived:
        """What `compute` gives, computed once. key: what it is, and all that decides it besides these statistics."""
        if key not in self.memo:
            self.memo[key] = compute()
        return cast(Derived, self.memo[key])


def reorder_stats(stats: Stats, order: Tensor) -> Stats:
    """The statistics of an input whose channel i was channel order[i]."""
    vectors = {name: getattr(stats, name) for name in ("col_norm", "total", "variance")}
    return Stats(
        hessian=None if stats.hessian is None else stats.hessian[order][:, order],
        cross=None if stats.cross is None else stats.cross[order][:, order],
        drift=None if stats.drift is None else stats.drift[:, order],
        **{name: None if vector is None else vector[order] for name, vector in vectors.items()},
    )


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


def _need(value: Tensor | None, name: str, shape: tuple[int, ...]) -> Tensor:
    if value is None:
        raise CalibrationError(f"the method needs the calibration statistic '{name}', which was not collected")
    if value.shape != shape:
        raise CalibrationError(f"the calibration statistic '{name}' is {tuple(value.shape)}, the weight needs {shape}")
    return value
