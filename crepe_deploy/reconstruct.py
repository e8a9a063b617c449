"""Reconstruction: for a given mask, the kept weights that reproduce the layer's output best.

With G = H + damping * mean(diag H) * I, H the Gram matrix of the layer's inputs, and B the wanted output times the
inputs (B = W G where the wanted output is the layer's own), every row w' of the answer minimises

    f(w') = w' G w'^T - 2 b w'^T        over the w' that are zero where the mask is

- `exact` solves the normal equations of each row, G_SS w'_S = b_S with S the row's kept columns, all rows at once by
  conjugate gradients that start from the given weights and never leave the mask. Each step lowers f, so the answer is
  never worse than the start, whatever the step at which it stops.
- `obs` is SparseGPT's sweep with the mask frozen: one pass over the columns, each pruned column compensated by those
  after it. It is cheaper and not optimal: a weight is not corrected for what was pruned after it. Rows that it would
  make worse keep the weights they had.

Damping pulls towards the dense weight, not towards zero, for it is in G and in B alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .errors import NumericalError
from .methods.base import Need, Solution, Stats, check_range, need_hessian
from .methods.sparsegpt import SparseGPT, sweep

TINY = 1e-30


@dataclass(frozen=True)
class Goal:
    """What a row minimises: gram (in, in), damped; wanted (out, in), the right-hand side of its normal equations."""

    gram: Tensor
    wanted: Tensor

    def error(self, weight: Tensor) -> Tensor:
        """(out,) fp64: f of each row of weight (out, in), up to a constant that only the goal decides."""
        return ((weight @ self.gram - 2 * self.wanted) * weight).sum(1, dtype=torch.float64)


class Reconstructor(Protocol):
    """Changes kept weights. `needs`: the statistics that it reads."""

    needs: ClassVar[frozenset[Need]]

    def __call__(self, dense: Tensor, start: Tensor, mask: Tensor, stats: Stats) -> Solution:
        """Weights (out, in) for the output of `dense` under `mask`, no row worse than `start`; the mask stays."""
        ...


@dataclass(frozen=True)
class Exact:
    """Least squares by conjugate gradients, to a relative residual of `tolerance` or for `max_steps`."""

    damping: float = 0.01
    tolerance: float = 1e-3
    max_steps: int = 200
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        check_range("damping", self.damping, 1e-8)
        check_range("tolerance", self.tolerance, 1e-7, 1)
        check_range("max_steps", self.max_steps, 1)

    def __call__(self, dense: Tensor, start: Tensor, mask: Tensor, stats: Stats) -> Solution:
        """The weights (out, in) fp32 that reproduce the output of `dense` under `mask`, searched from `start`."""
        goal = make_goal(dense, stats, self.damping)
        weight, steps = solve_masked(goal, start.float(), mask, self.tolerance, self.max_steps)
        return _solution(goal, dense, start.float(), weight, mask, {"damping": self.damping, "steps": float(steps)})


@dataclass(frozen=True)
class Obs:
    """SparseGPT's sweep with the mask frozen; `damping` is raised tenfold up to `max_damping` when needed."""

    damping: float = 0.01
    max_damping: float = 1.0
    block_size: int = 128
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        SparseGPT(self.damping, self.block_size, self.max_damping)  # the same limits

    def __call__(self, dense: Tensor, start: Tensor, mask: Tensor, stats: Stats) -> Solution:
        """The swept weights (out, in) fp32; rows of `start` (masked) where the sweep would raise the error."""
        factor = SparseGPT(self.damping, self.block_size, self.max_damping).factor(stats, dense)
        goal = make_goal(dense, stats, factor.damping)
        weight = sweep(dense, mask, factor, self.block_size)
        return _solution(goal, dense, start.float(), weight, mask, {"damping": factor.damping})


RECONSTRUCTORS: dict[str, type[Exact] | type[Obs]] = {"exact": Exact, "obs": Obs}


def make_goal(dense: Tensor, stats: Stats, damping: float) -> Goal:
    """The goal of reproducing the output of `dense` (out, in). Raises CalibrationError, NumericalError.

    Inputs that were 0 on every calibration token get a diagonal of 1 before the mean is taken, as in SparseGPT.
    """
    hessian = need_hessian(stats, dense)
    if not hessian.isfinite().all():
        raise NumericalError("the hessian is not finite: calibration produced NaN or infinite activations")
    gram = hessian.float().clone()
    diagonal = gram.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    return Goal(gram, dense.float() @ gram)


def solve_masked(goal: Goal, start: Tensor, mask: Tensor, tolerance: float, max_steps: int) -> tuple[Tensor, int]:
    """Minimise the goal over weights (out, in) that vanish outside `mask` -> (weight fp32, steps taken).

    Preconditioned by the diagonal. Stops when every row's residual is below `tolerance` times its first, in the norm
    of the preconditioner. A row that is solved stands still: its step is zero.
    """
    scale = goal.gram.diagonal().reciprocal()
    weight = start * mask
    residual = (goal.wanted - weight @ goal.gram) * mask
    conditioned = residual * scale
    direction = conditioned
    size = (residual * conditioned).sum(1, keepdim=True)
    enough = tolerance**2 * size
    for step in range(max_steps):
        if bool((size <= enough).all()):
            return weight, step
        image = (direction @ goal.gram) * mask
        length = size / (direction * image).sum(1, keepdim=True).clamp_min(TINY)
        weight = weight.addcmul(length, direction)
        residual = residual.addcmul(length, image, value=-1)
        conditioned = residual * scale
        before, size = size, (residual * conditioned).sum(1, keepdim=True)
        direction = conditioned.addcmul(size / before.clamp_min(TINY), direction)
    return weight, max_steps


def _solution(
    goal: Goal, dense: Tensor, start: Tensor, weight: Tensor, mask: Tensor, notes: dict[str, float]
) -> Solution:
    """Keep the better of `start` and `weight` row by row, and say what it brought. Raises NumericalError."""
    if not weight.isfinite().all():
        raise NumericalError("the reconstructed weight is not finite: the weight or its hessian is damaged")
    masked = start * mask
    floor, before, after = goal.error(dense.float()), goal.error(masked), goal.error(weight)
    worse = after > before
    result = torch.where(worse.unsqueeze(1), masked, weight)
    left = (torch.minimum(before, after) - floor).sum() / (before - floor).sum().clamp_min(TINY)
    return Solution(result, mask, {**notes, "error_left": float(left), "rows_left_alone": float(worse.sum())})
