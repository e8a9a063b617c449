"""Reconstruction: for a given mask, the kept weights that reproduce the wanted output best.

With X the layer's inputs, H = X^T X, G = H + D with D the diagonal that damping adds (`damping`) and Y the wanted
output, every row w' of the answer minimises

    f(w') = w' G w'^T - 2 b w'^T        over the w' that are zero where the mask is, B = Y^T X + W D

Y is X W^T, the layer's own output; with `--feed both` it is what the dense model puts out there, plus, for layers that
write to the residual stream, what that stream has lost on the way.

- `exact` solves the normal equations of each row, G_SS w'_S = b_S with S the row's kept columns, all rows at once by
  conjugate gradients that start from the given weights and never leave the mask. Each step lowers f, so the answer is
  never worse than the start, whatever the step at which it stops.
- `admm` (after ALPS, Meng et al., NeurIPS 2024) searches the mask too: it alternates between the best dense weight
  near D, D the best pruned weight near that, and a multiplier that brings the two together under a growing penalty;
  inputs are scaled to a unit diagonal. `exact` then solves for the mask that it ends with. Rows that end worse than
  they started (all, where zeros are counted over the matrix) keep mask and weights.
- `obs` is SparseGPT's sweep with the mask frozen: one pass over the columns, each pruned column compensated by those
  after it. It is cheaper and not optimal: a weight is not corrected for what was pruned after it. Rows that it would
  make worse keep the weights they had.

Damping pulls towards the dense weight, not towards zero, for it is in G and in B alike. `obs` knows nothing of Y: it
aims at the layer's own output whatever the feed, and is judged by that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from crepe_deploy.errors import NumericalError
from crepe_deploy.model.calibrate import bf16_products
from crepe_deploy.model.stats import Need, Stats, need_hessian
from crepe_deploy.pattern import Pattern, Unstructured
from crepe_deploy.select import select

from ..methods.base import Solution, check_range
from ..methods.damping import DampingRule, check_rule, revive, ridge
from ..methods.sparsegpt import SparseGPT, sweep

TINY = 1e-30


@dataclass(frozen=True)
class Goal:
    """What a row minimises: gram (in, in), damped; wanted (out, in), the right-hand side of its normal equations.

    damping, rule: of gram.
    """

    gram: Tensor
    wanted: Tensor
    damping: float
    rule: DampingRule

    def error(self, weight: Tensor) -> Tensor:
        """(out,) fp64: f of each row of weight (out, in), up to a constant that only the goal decides."""
        return ((weight @ self.gram - 2 * self.wanted) * weight).sum(1, dtype=torch.float64)


class Reconstructor(Protocol):
    """Changes kept weights. `needs`: the statistics that it reads."""

    needs: ClassVar[frozenset[Need]]

    def __call__(self, dense: Tensor, start: Tensor, mask: Tensor, stats: Stats, pattern: Pattern) -> Solution:
        """Weights (out, in) for the output of `dense` under `mask`, no row worse than `start`; `mask` fits `pattern`.

        Only `admm` returns another mask than it was given.
        """
        ...


@dataclass(frozen=True)
class Exact:
    """Least squares by conjugate gradients, to a relative residual of `tolerance` or for `max_steps`."""

    damping: float = 0.1
    tolerance: float = 0.01
    max_steps: int = 60
    damping_rule: DampingRule = "mean"
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        check_range("damping", self.damping, 1e-8)
        check_range("tolerance", self.tolerance, 1e-7, 1)
        check_range("max_steps", self.max_steps, 1)
        check_rule(self.damping_rule)

    def __call__(self, dense: Tensor, start: Tensor, mask: Tensor, stats: Stats, pattern: Pattern) -> Solution:
        """The weights (out, in) fp32 that reproduce the wanted output under `mask`, searched from `start`."""
        goal = make_goal(dense, stats, self.damping, self.damping_rule)
        weight, steps = solve_masked(goal, start.float(), mask, self.tolerance, self.max_steps)
        kept = Solution(start.float() * mask, mask, {})
        notes = {"damping": self.damping, "steps": float(steps)}
        floor = goal.error(_unmasked(stats, dense, goal))
        return _better(goal, floor, kept, Solution(weight, mask, notes), pattern)


@dataclass(frozen=True)
class Admm:
    """`steps` alternations from `penalty`, which grows up to `growth` fold while the mask still moves; then `exact`."""

    damping: float = 0.1
    steps: int = 20
    penalty: float = 0.3
    growth: float = 1.3
    tolerance: float = 0.01
    max_steps: int = 20
    damping_rule: DampingRule = "mean"
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        Exact(self.damping, self.tolerance, self.max_steps, self.damping_rule)  # the same limits
        check_range("steps", self.steps, 1)
        check_range("penalty", self.penalty, 1e-6)
        check_range("growth", self.growth, 1, 10)

    def __call__(self, dense: Tensor, start: Tensor, mask: Tensor, stats: Stats, pattern: Pattern) -> Solution:
        """Weights and mask for the wanted output, searched from `start` and `mask`."""
        goal = make_goal(dense, stats, self.damping, self.damping_rule)
        spectrum = _spectrum(stats, goal)
        free = _unmasked(stats, dense, goal)
        moved, near = search_mask(goal, spectrum, free, mask, pattern, self.steps, self.penalty, self.growth)
        weight, steps = solve_masked(goal, near, moved, self.tolerance, self.max_steps)
        notes = {"damping": self.damping, "steps": float(steps), "mask_moved": float((moved != mask).float().mean())}
        kept = Solution(start.float() * mask, mask, {})
        return _better(goal, goal.error(free), kept, Solution(weight, moved, notes), pattern)


@dataclass(frozen=True)
class Obs:
    """SparseGPT's sweep with the mask frozen; `damping` is raised tenfold up to `max_damping` when needed."""

    damping: float = 0.01
    max_damping: float = 1.0
    block_size: int = 128
    damping_rule: DampingRule = "mean"
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        self._method()  # the same limits

    def __call__(self, dense: Tensor, start: Tensor, mask: Tensor, stats: Stats, pattern: Pattern) -> Solution:
        """The swept weights (out, in) fp32; rows of `start` (masked) where the sweep would raise the error."""
        factor = self._method().factor(stats, dense)
        goal = make_goal(dense, Stats(hessian=stats.hessian), factor.damping, self.damping_rule)
        weight = sweep(dense, mask, factor, self.block_size)
        kept = Solution(start.float() * mask, mask, {})
        swept = Solution(weight, mask, {"damping": factor.damping})
        return _better(goal, goal.error(dense.float()), kept, swept, pattern)

    def _method(self) -> SparseGPT:
        return SparseGPT(self.damping, self.block_size, self.max_damping, self.damping_rule)


RECONSTRUCTORS: dict[str, type[Exact] | type[Admm] | type[Obs]] = {"exact": Exact, "admm": Admm, "obs": Obs}


def make_goal(dense: Tensor, stats: Stats, damping: float, rule: DampingRule = "mean") -> Goal:
    """The goal of putting out what `dense` (out, in) should, see `Stats`. Raises CalibrationError, NumericalError.

    Inputs that were 0 on every calibration token get a diagonal of 1 before anything is added, as in SparseGPT.
    """
    gram = need_hessian(stats, dense).float().clone()
    dead, diagonal = revive(gram), gram.diagonal()
    unit = ridge(diagonal, rule)
    added = damping * unit + dead.float()  # what is not in H pulls towards the dense weight
    diagonal += damping * unit
    weight = dense.float()
    if stats.cross is None:
        return Goal(gram, weight @ gram, damping, rule)
    wanted = torch.addcmul(weight @ stats.cross, weight, added)
    return Goal(gram, wanted if stats.drift is None else wanted.add_(stats.drift), damping, rule)


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


def search_mask(
    goal: Goal,
    spectrum: Spectrum,
    free: Tensor,
    mask: Tensor,
    pattern: Pattern,
    steps: int,
    penalty: float,
    growth: float,
) -> tuple[Tensor, Tensor]:
    """ADMM from the unmasked optimum `free` (out, in) and a mask -> (mask that fits `pattern`, weight near its best).

    All in inputs scaled to a unit diagonal of the Gram matrix, so that one penalty suits every channel and a mask keeps
    what matters rather than what is large. Products may round to bf16: they only choose, `solve_masked` computes.
    """
    pruned = free * spectrum.scale * mask
    rotated = (goal.wanted / spectrum.scale) @ spectrum.vectors
    multiplier = torch.zeros_like(pruned)
    for step in range(steps):
        with bf16_products():
            right = rotated + (penalty * pruned - multiplier) @ spectrum.vectors
            weight = (right / (spectrum.values + penalty)) @ spectrum.vectors.T
        shifted = weight + multiplier / penalty
        chosen = select(shifted.abs(), pattern)
        moved = float((chosen != mask).float().mean())
        pruned, mask = shifted * chosen, chosen
        multiplier += penalty * (weight - pruned)
        if step % 3 == 2:  # slower as the mask settles
            penalty *= growth if moved > 0.01 else growth ** (0.4 if moved > 0.001 else 0.1)
    return mask, pruned / spectrum.scale


@dataclass(frozen=True)
class Spectrum:
    """Eigenvectors (in, in) and -values (in,) of a Gram matrix scaled to a unit diagonal; scale (in,), its roots."""

    vectors: Tensor
    values: Tensor
    scale: Tensor


def _spectrum(stats: Stats, goal: Goal) -> Spectrum:
    """Once for each shared input."""

    def decompose() -> Spectrum:
        scale = goal.gram.diagonal().sqrt()
        values, vectors = torch.linalg.eigh(goal.gram / scale / scale.unsqueeze(1))
        return Spectrum(vectors, values.clamp_min(goal.damping * 1e-3), scale)

    return stats.derived((Spectrum, goal.damping, goal.rule, goal.gram.device), decompose)


def _unmasked(stats: Stats, dense: Tensor, goal: Goal) -> Tensor:
    """The best weights (out, in) without a mask: the dense ones where the wanted output is the layer's own.

    The Gram matrix is factorised once for each shared input.
    """
    if stats.cross is None:
        return dense.float()

    def factorise() -> Tensor:
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(goal.gram)
        if failed:
            raise NumericalError(f"the hessian is not positive definite with damping {goal.damping:g}: raise it")
        return lower

    factor = stats.derived(("cholesky", goal.damping, goal.rule, goal.gram.device), factorise)
    return torch.cholesky_solve(goal.wanted.T, factor).T


def _better(goal: Goal, floor: Tensor, before: Solution, after: Solution, pattern: Pattern) -> Solution:
    """The better of two solutions row by row, and what it brought. Raises NumericalError if `after` is not finite.

    Where a mask is counted over the whole matrix another one is taken or left as a whole.
    """
    if not after.weight.isfinite().all():
        raise NumericalError("the reconstructed weight is not finite: give other text, or leave the layer out")
    first, second = goal.error(before.weight), goal.error(after.weight)
    worse = second > first
    if isinstance(pattern, Unstructured) and pattern.granularity == "matrix" and before.mask is not after.mask:
        worse = (second.sum() > first.sum()).expand_as(worse)
    left = (torch.where(worse, first, second) - floor).sum() / (first - floor).sum().clamp_min(TINY)
    rows = worse.unsqueeze(1)
    weight, mask = torch.where(rows, before.weight, after.weight), torch.where(rows, before.mask, after.mask)
    return Solution(weight, mask, {**after.notes, "error_left": float(left), "rows_left_alone": float(worse.sum())})
