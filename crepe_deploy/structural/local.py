"""Local pruning of one output projection: which input channels go, in which order, and the exact refit of the rest.

With X the inputs (tokens, in), W (in, out) the weight, channels first as in the Týr paper (arXiv 2503.09657), and Y the
wanted output (X W unless said otherwise), everything here minimises

    f(W') = tr(W'^T H W') / 2 - tr(W'^T G),    H = X^T X + damping * mean(diag X^T X) * I,
                                               G = X^T Y + damping * mean(diag X^T X) * W

over the W' whose removed rows are zero. Damping pulls towards W, so that nothing removed changes nothing.

Channels are removed unit by unit (algorithm 1). With U the inverse of H on the channels left and W the best weight on
them, removing the set S keeps W best and U the inverse by

    W <- W - U[:, S] U[S, S]^-1 W[S, :]        U <- U - U[:, S] U[S, S]^-1 U[S, :]

(the paper's Eq. 10 for one channel; its Algorithm 1 prints the opposite sign). The paper's update of the weight, read
with the gradient taken where the channel is zero, is the same step. What differs between the paper and its public code
is the saliency of a channel p or a head with the channels g (`VARIANTS`):

    paper   |G_p . W_p| + ||W_p||^2 / (2 U_pp), a head by the mean over its channels (Eq. 4)
    code    G_p . W_p + ||W_p||^2 / (2 U_pp) without the absolute value, a head by
            sum_g W_g o (U_gg^-1 W_g / 2 + G_g) with the inverse of its block, summed
    obs     the second term of `code` alone: exactly what f rises by

At the end the kept rows are solved for exactly, W_keep = H_keep,keep^-1 G_keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crepe_deploy.errors import CalibrationError, NumericalError
from crepe_deploy.model.stats import Stats
from crepe_deploy.pruning.methods.damping import ridge

DAMPING = 0.01

Saliency = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Quadratic:
    """f above: hessian (in, in) positive definite, gradient (in, out); both fp64."""

    hessian: Tensor
    gradient: Tensor

    def restrict(self, channels: Tensor) -> Quadratic:
        """f over the weights that are zero outside `channels` (kept,) int64, in that order."""
        square = self.hessian.index_select(0, channels).index_select(1, channels)  # far faster than [a][:, a]
        return Quadratic(square, self.gradient.index_select(0, channels))


def quadratic(weight: Tensor, stats: Stats, damping: float = DAMPING) -> Quadratic:
    """f for a stored weight (out, in) and the statistics of its input.

    Y is what the dense model puts out where `stats` has `cross` and `drift`, the layer's own output otherwise.
    Raises CalibrationError without a Hessian, NumericalError where it is not finite.
    """
    if stats.hessian is None:
        raise CalibrationError("local pruning needs the Hessian of the layer's input")
    gram, rows = stats.hessian.double(), weight.T.double()
    if not torch.isfinite(gram).all():
        raise NumericalError("the activations in front of a layer are not finite: the model or the text is damaged")
    added = damping * float(ridge(gram.diagonal(), "mean")) or 1.0
    wanted = gram @ rows if stats.cross is None else stats.cross.T.double() @ rows
    if stats.drift is not None:
        wanted = wanted + stats.drift.T.double()
    hessian = gram.clone()
    hessian.diagonal().add_(added)
    return Quadratic(hessian, wanted.add_(rows, alpha=added))


def _blocks(inverse: Tensor, count: int) -> Tensor:
    """The diagonal blocks (count, size, size) of a square matrix."""
    size = inverse.shape[0] // count
    return inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _removal_cost(units: Tensor, inverse: Tensor) -> Tensor:
    """(count,): sum W_g o U_gg^-1 W_g / 2, exactly what f rises by when the unit goes."""
    if units.shape[1] == 1:
        return units.square().sum((1, 2)) / (2 * inverse.diagonal())
    solved = torch.cholesky_solve(units, cholesky(_blocks(inverse, len(units))))
    return (units * solved).sum((1, 2)) / 2


def paper(units: Tensor, gradient: Tensor, inverse: Tensor) -> Tensor:
    """Eq. 4 for each channel, the mean over a unit's channels; see `VARIANTS`."""
    curvature = units.square().sum(2) / (2 * inverse.diagonal().view(units.shape[:2]))
    return ((units * gradient).sum(2).abs() + curvature).mean(1)


def code(units: Tensor, gradient: Tensor, inverse: Tensor) -> Tensor:
    """The public code's score; see `VARIANTS`."""
    return (units * gradient).sum((1, 2)) + _removal_cost(units, inverse)


def obs(units: Tensor, gradient: Tensor, inverse: Tensor) -> Tensor:
    """The Hessian term alone; see `VARIANTS`."""
    return _removal_cost(units, inverse)


# units, gradient (count, size, out), inverse (count * size, count * size) -> saliency (count,); the lowest goes first.
VARIANTS: dict[str, Saliency] = {"paper": paper, "code": code, "obs": obs}
DEFAULT_VARIANT = "obs"


def removal_order(
    problem: Quadratic,
    units: Tensor,
    variant: str = DEFAULT_VARIANT,
    *,
    remaining: int = 1,
    per_round: int = 1,
    classes: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[int]:
    """Remove units one after another until `remaining` are left; returns those removed, first removed first.

    units: (count, size) int64, the channels of each unit, all channels of `problem` exactly once.
    per_round: units removed between two updates. classes: with them a round takes the lowest unit of every class, so
    that all classes, which must be equally large, stay so; `per_round` is then not used.
    dtype: of the sweep; the inverse it starts from is fp64. Raises NumericalError.
    """
    if len(units) <= remaining:
        return []
    alive = torch.arange(len(units), device=units.device)
    within = problem.restrict(units.flatten())
    factor = cholesky(within.hessian)
    weight = torch.cholesky_solve(within.gradient, factor).to(dtype).contiguous()
    inverse = torch.cholesky_inverse(factor).to(dtype).contiguous()
    gradient, size = within.gradient.to(dtype), units.shape[1]
    labels = torch.zeros_like(alive) if classes is None else torch.tensor(classes, device=units.device)
    removed: list[int] = []
    while len(alive) > remaining:
        shape = (len(alive), size, weight.shape[1])
        scores = VARIANTS[variant](weight.view(shape), gradient.view(shape), inverse)
        budget = len(alive) - remaining
        gone = _lowest(scores, alive, labels[alive], min(per_round, budget) if classes is None else None)
        removed += alive[gone].tolist()
        _remove(weight, inverse, _features(gone, size))
        left = len(alive) - len(gone)
        holes, last = gone[gone < left], torch.ones_like(alive, dtype=torch.bool)
        last[:left] = False
        last[gone] = False
        tail = last.nonzero().flatten()
        alive[holes] = alive[tail]
        alive = alive[:left]
        weight, gradient, inverse = _moved(
            weight, gradient, inverse, _features(holes, size), _features(tail, size), left * size
        )
    return removed


def _lowest(scores: Tensor, names: Tensor, labels: Tensor, count: int | None) -> Tensor:
    """Positions of the `count` lowest scores, ascending by score; without a count the lowest of each label.

    Equal scores go by name.
    """
    by_name = names.argsort()
    order = by_name[scores[by_name].argsort(stable=True)]
    if count is not None:
        return order[:count]
    return torch.stack([order[labels[order] == label][0] for label in sorted(set(labels.tolist()))])


def _features(positions: Tensor, size: int) -> Tensor:
    return (positions.unsqueeze(1) * size + torch.arange(size, device=positions.device)).flatten()


def _remove(weight: Tensor, inverse: Tensor, gone: Tensor) -> None:
    """Make the weight (n, out) and the inverse (n, n) those without the channels `gone`, whose rows become useless."""
    across = inverse.index_select(0, gone)
    factor = cholesky(across.index_select(1, gone))
    step = torch.cholesky_solve(torch.cat([across, weight.index_select(0, gone)], dim=1), factor)
    inverse.addmm_(across.T, step[:, : len(inverse)], alpha=-1)
    weight.addmm_(across.T, step[:, len(inverse) :], alpha=-1)


def _moved(
    weight: Tensor, gradient: Tensor, inverse: Tensor, holes: Tensor, last: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` rows of all three, and columns of the inverse, once `last` have moved into `holes`; views.

    Nothing else is copied: a sweep that copies what is left each round spends most of its time on that.
    """
    for rows in (weight, gradient, inverse, inverse.T):
        rows[holes] = rows[last]
    return weight[:count], gradient[:count], inverse[:count, :count]


def refit_nested(problem: Quadratic, order: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The exact minimiser for each prefix of `order`: W (size, out) fp64, rows in that order.

    order: (n,) int64 channels, the most important first. One factorisation serves all sizes: the leading block of a
    Cholesky factor is the factor of the leading block. Raises NumericalError.
    """
    within = problem.restrict(order[: max(sizes)])
    factor = cholesky(within.hessian)
    forward = torch.linalg.solve_triangular(factor, within.gradient, upper=False)
    return [
        torch.linalg.solve_triangular(factor[:size, :size].T, forward[:size], upper=True) for size in sizes
    ]  # fmt: skip


def cholesky(matrix: Tensor) -> Tensor:
    """The lower factor of one matrix or a batch. Raises NumericalError where one is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        raise NumericalError(
            "a layer's Hessian is not positive definite: its calibration inputs are degenerate; give more text"
        )
    lower: Tensor = factor
    return lower
