"""What calibration tells of a linear layer's input: the statistics that methods and steps read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from crepe_deploy.errors import CalibrationError, NumericalError

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


@dataclass
class Variety:
    """Whether the rows seen so far differ at all; looks no further than the first that does."""

    varied: bool = False
    _first: Tensor | None = None

    def see(self, rows: Tensor) -> None:
        """`rows` (tokens, in) of one layer's input."""
        if self.varied or not len(rows):
            return
        first = self._first = rows[0].clone() if self._first is None else self._first
        self.varied = any(not torch.equal(row, first) for row in rows)


def check_inputs(layer: str, stats: Stats, *, varied: bool) -> Stats:
    """`stats` of the input of `layer`, if a choice can rest on them. All that is collected passes here.

    Inputs that were 0 on every token are common; all of them, or one input for every token, say nothing of a layer.
    varied: whether any token's input differed from another's. Raises NumericalError naming the layer and the way out.
    """
    collected = {name: value for name, value in vars(stats).items() if isinstance(value, Tensor)}
    if not all(bool(value.isfinite().all()) for value in collected.values()):
        raise NumericalError(
            f"the inputs of {layer} are not finite on the calibration text: they overflow the dtype of computation, or "
            "the model is damaged; compute with --dtype float32"
        )
    sizes = stats.col_norm if stats.hessian is None else stats.hessian.diagonal()
    if sizes is not None and not bool(sizes.any()):
        raise NumericalError(
            f"the inputs of {layer} are zero on the whole calibration text, which leaves nothing to choose by: "
            "give other text, or leave the layer out"
        )
    if collected and not varied:
        raise NumericalError(
            f"the input of {layer} is the same for every token of the calibration text, which leaves nothing to choose "
            "by: give other text, or leave the layer out"
        )
    return stats


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
