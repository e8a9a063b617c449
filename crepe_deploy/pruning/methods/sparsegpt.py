"""SparseGPT (Frantar and Alistarh, ICML 2023): prune column by column and let the columns that follow compensate.

With U the upper Cholesky factor of the damped inverse hessian, H^-1 = U^T U (its algorithm 1):

    score  w^2 / U_ii^2, higher = keep
    error  e = (w - pruned w) / U_ii;   W[:, j] -= e * U_ij for every later column j

The update of the later columns is delayed: within a strip it is made column by column, from strip to strip and from
block to block by one matrix product. Weights are held transposed, (in, out), so that a column is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError, NumericalError
from crepe_deploy.grid import Grid, Quantized
from crepe_deploy.model.stats import Need, Stats, need_hessian
from crepe_deploy.pattern import NM, Pattern, Unstructured, check_divides, fraction_of
from crepe_deploy.select import largest_in_matrix, largest_per_group, largest_per_row

from .base import Feed, Solution, check_range
from .damping import DampingRule, check_rule, revive, ridge

STRIP = 16  # columns corrected one by one before a matrix product takes over
DAMPING_STEP = 10
Rounding = Callable[[Tensor], Tensor]  # kept weights (out,) of one column -> what they are stored as


@dataclass(frozen=True)
class Factor:
    """What SparseGPT needs of a hessian.

    upper: (in, in) fp32, upper triangular, upper^T upper = (H damped)^-1, see `damping`.
    dead: (in,) bool, inputs that were 0 on every calibration token. damping: the fraction that was needed.
    """

    upper: Tensor
    dead: Tensor
    damping: float


@dataclass(frozen=True)
class SparseGPT:
    """Prunes in blocks of about `block_size` columns; `damping` is raised tenfold up to `max_damping` when needed."""

    damping: float = 0.01
    block_size: int = 128
    max_damping: float = 1.0
    damping_rule: DampingRule = "mean"
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})
    feed: ClassVar[Feed] = "pruned"

    def __post_init__(self) -> None:
        check_range("damping", self.damping, 1e-8)
        check_range("max_damping", self.max_damping, self.damping)
        check_rule(self.damping_rule)
        if type(self.block_size) is not int or self.block_size < 1:
            raise ConfigError(f"block_size is {self.block_size!r}; it must be a whole number of columns")

    def solve(self, weight: Tensor, stats: Stats, pattern: Pattern) -> Solution:
        """`weight` (out, in), any float dtype -> mask and updated weight. Does not mutate.

        N:M chooses when it reaches each group of M columns; an unstructured pattern chooses once per block, in shares
        that add up to the exact count. notes["damping"]: the fraction that was needed. Raises PatternError if the
        pattern does not fit, CalibrationError if `stats.hessian` is missing or misshapen, and NumericalError if it
        cannot be factorised or the result is not finite.
        """
        check_divides(pattern, "weight", weight.shape[1])
        factor = self.factor(stats, weight)
        mask = torch.empty(weight.shape[::-1], dtype=torch.bool, device=weight.device)
        columns = _swept(weight, mask, factor, self.block_size, pattern)
        if not columns.isfinite().all():
            raise NumericalError("SparseGPT's updated weight is not finite: give other text, or leave the layer out")
        return Solution(columns.t().contiguous(), mask.t().contiguous(), {"damping": factor.damping})

    def factor(self, stats: Stats, weight: Tensor) -> Factor:
        """The factor of the hessian, computed once per `Stats` and so once per shared input."""
        hessian = need_hessian(stats, weight)
        key = (Factor, self.damping, self.max_damping, self.damping_rule, hessian.device)
        return stats.derived(key, lambda: factorise(hessian, self.damping, self.max_damping, self.damping_rule))


def sweep(weight: Tensor, mask: Tensor, factor: Factor, block_size: int) -> Tensor:
    """SparseGPT's update for a mask (out, in) that is given: `weight` (out, in) -> fp32 (out, in). Does not mutate."""
    return _swept(weight, mask.t().contiguous(), factor, block_size, None).t().contiguous()


def sweep_codes(weight: Tensor, mask: Tensor, factor: Factor, grid: Grid, block_size: int) -> Quantized:
    """GPTQ under a mask (out, in): each kept weight goes to the grid, and the columns behind make up for it.

    A group's scales are chosen when the sweep reaches it, from weights that have made up for all before. Pruned weights
    stay 0; with nothing pruned this is GPTQ. Does not mutate. Raises NumericalError if the result is not finite.
    """
    columns = weight.detach().t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    columns[factor.dead] = 0
    keep = mask.t().contiguous()
    width = grid.width(len(columns))
    scales: list[Tensor] = []
    for start, end in _spans(0, len(columns), math.gcd(block_size, width), None):
        if start % width == 0:
            group = slice(start, start + width)
            scales.append(grid.scale(columns[group], keep[group]))
        error = _prune_block(columns, keep, factor.upper, start, end, None, partial(grid.nearest, scale=scales[-1]))
        columns[end:].addmm_(factor.upper[start:end, end:].t(), error, alpha=-1)
    if not columns.isfinite().all():
        raise NumericalError("the quantised weight is not finite: give other text, or leave the layer out")
    return Quantized(columns.t().contiguous(), torch.stack(scales, dim=1))


def _swept(weight: Tensor, mask: Tensor, factor: Factor, block_size: int, pattern: Pattern | None) -> Tensor:
    """`weight` (out, in) pruned block by block -> fp32 (in, out). `mask` (in, out): filled, or given if no pattern."""
    columns = weight.detach().t().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    columns[factor.dead] = 0
    for start, end in _spans(0, len(columns), block_size, pattern):
        error = _prune_block(columns, mask, factor.upper, start, end, pattern)
        columns[end:].addmm_(factor.upper[start:end, end:].t(), error, alpha=-1)
    return columns


def factorise(hessian: Tensor, damping: float, max_damping: float, rule: DampingRule = "mean") -> Factor:
    """`hessian` (in, in) -> its Factor, trying `damping`, 10 * damping, ... up to `max_damping`. Does not mutate.

    Dead inputs get a diagonal of 1. Raises NumericalError if the hessian is not finite or if it is not positive
    definite at the largest damping either.
    """
    # H = V V^T with V upper, the Cholesky factorisation of H in reverse order, gives U = V^-1 from one factorisation
    # instead of two with an inversion between them.
    reverse = hessian.float().flip(0, 1)
    dead = revive(reverse)
    diagonal = reverse.diagonal()
    undamped, unit = diagonal.clone(), ridge(diagonal, rule)
    tried = damping
    while tried <= max_damping * (1 + 1e-6):
        diagonal.copy_(undamped + tried * unit)
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed:
            identity = torch.eye(len(reverse), device=reverse.device)
            upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
            if upper.isfinite().all():
                return Factor(upper, dead.flip(0), tried)
        tried *= DAMPING_STEP
    raise NumericalError(
        f"the hessian is not positive definite, even with {tried / DAMPING_STEP:g} of its mean diagonal added: "
        f"calibrate on more text or raise max_damping above {max_damping:g}"
    )


def _spans(start: int, end: int, size: int, pattern: Pattern | None) -> Iterator[tuple[int, int]]:
    """Cut start..end into spans of `size` columns, or the nearest whole number of N:M groups below (at least one)."""
    step = pattern.m * max(1, size // pattern.m) if isinstance(pattern, NM) else size
    for left in range(start, end, step):
        yield left, min(left + step, end)


def _prune_block(
    columns: Tensor,
    mask: Tensor,
    upper: Tensor,
    start: int,
    end: int,
    pattern: Pattern | None,
    rounded: Rounding | None = None,
) -> Tensor:
    """Prune `columns[start:end]`, fill `mask[start:end]` (both (in, out)) and return the errors (block, out).

    Without a pattern the mask is given and not touched. rounded: what becomes of kept weights, if they change.
    """
    error = torch.empty_like(columns[start:end])
    if isinstance(pattern, Unstructured):
        mask[start:end] = _block_mask(columns, upper, start, end, pattern)
    for left, right in _spans(start, end, STRIP, pattern):
        here = slice(left, right)
        columns[here].addmm_(upper[start:left, here].t(), error[: left - start], alpha=-1)
        _prune_strip(
            columns[here], mask[here], upper[here, here], error[left - start : right - start], pattern, rounded
        )
    return error


def _prune_strip(
    columns: Tensor, mask: Tensor, upper: Tensor, error: Tensor, pattern: Pattern | None, rounded: Rounding | None
) -> None:
    """Prune `columns` (strip, out) in place given `upper` (strip, strip); fill `error` and, for N:M, `mask`."""
    pivots = upper.diagonal().tolist()
    for i, pivot in enumerate(pivots):
        if isinstance(pattern, NM) and i % pattern.m == 0:
            group = slice(i, i + pattern.m)
            score = _score(columns[group], upper.diagonal()[group])
            mask[group] = largest_per_group(score, pattern.n, pattern.m).t()
        if rounded is None:
            torch.div(columns[i].masked_fill(mask[i], 0), pivot, out=error[i])
        else:
            goal = rounded(columns[i]).masked_fill_(~mask[i], 0)
            torch.div(columns[i] - goal, pivot, out=error[i])
            columns[i] = goal
        columns[i + 1 :].addr_(upper[i, i + 1 :], error[i], alpha=-1)
    columns.masked_fill_(~mask, 0)


def _score(columns: Tensor, pivots: Tensor) -> Tensor:
    """w^2 / U_ii^2 of `columns` (width, out) with `pivots` (width,) -> (out, width), higher = keep."""
    return (columns / pivots.unsqueeze(1)).square_().t()


def _block_mask(columns: Tensor, upper: Tensor, start: int, end: int, pattern: Unstructured) -> Tensor:
    """The block's share of the zeros, chosen by one threshold per row or for the whole block -> bool (block, out)."""
    score = _score(columns[start:end], upper.diagonal()[start:end])
    width, out_features = len(columns), len(score)
    if pattern.granularity == "row":
        zeros = _share(fraction_of(width, pattern.sparsity), start, end, width)
        return largest_per_row(score, end - start - zeros).t()
    zeros = _share(fraction_of(out_features * width, pattern.sparsity), start, end, width)
    return largest_in_matrix(score, score.numel() - zeros).t()


def _share(total: int, start: int, end: int, width: int) -> int:
    """The part of `total` that falls to columns start..end of `width`; the parts of all blocks add up to `total`."""
    return total * end // width - total * start // width
