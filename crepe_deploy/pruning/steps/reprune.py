"""Re-pruning: swap kept and pruned weights of a row, group by group, without changing any count.

With W the dense weight (out, in), x_j the inputs and m_ij = W_ij * sum_t x_jt (what weight ij adds to the sum of output
i over the calibration tokens, averaged over sequences), pruning shifts output i by err_i = sum of m_ij over the pruned.

- `dsnot` (Zhang et al., ICLR 2024) swaps, row by row, a pruned weight that brings err_i towards zero (the largest
  m_ij / var(x_j)^power of err_i's sign) for the kept weight of its group with the lowest Wanda score; where a row is
  one group, for the lowest that moves err_i towards zero as well. `dsnot-ria` orders the kept ones by RIA's score
  instead (our reading of the relative-importance variant of Yi and Richtarik, arXiv 2501.18980, whose formula is not
  public). A swap is made only where |err_i| falls and, in groups, keeps its sign. What is guaranteed: |err_i| of no row
  rises. That is the mean shift of an output, not its squared error, which may rise.
- `swaps` (after arXiv 2512.10922) works on the squared error itself, e = sum_i d_i H d_i^T with d the pruned part of W
  and H the Gram matrix: sweeping over the groups, each row makes the swap that lowers e most, if any does. What is
  guaranteed: the squared output error on the calibration tokens of no row rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.stats import Need, Stats, need_hessian, need_moments
from crepe_deploy.nearest import unknown
from crepe_deploy.pattern import NM, Pattern

from ..methods.base import check_range
from ..methods.ria import RIA
from ..methods.wanda import Wanda

Order = Literal["wanda", "ria"]
INFINITY = float("inf")


class Repruner(Protocol):
    """Changes a mask. `needs`: the statistics that it reads."""

    needs: ClassVar[frozenset[Need]]

    def check(self, pattern: Pattern) -> None:
        """Raise ConfigError where it has no meaning for `pattern`."""
        ...

    def __call__(self, weight: Tensor, mask: Tensor, stats: Stats, pattern: Pattern) -> tuple[Tensor, dict[str, float]]:
        """Dense weight (out, in), keep mask -> a new mask with the same count in every group, and notes."""
        ...


@dataclass(frozen=True)
class DSnoT:
    """`order` of the kept weights, `power` of the variance, at most `max_cycles`, until |err_i| <= `enough`."""

    order: Order = "wanda"
    power: float = 1.0
    max_cycles: int = 50
    enough: float = 0.1
    needs: ClassVar[frozenset[Need]] = frozenset({"col_norm", "moments"})

    def __post_init__(self) -> None:
        check_range("power", self.power, 0)
        check_range("max_cycles", self.max_cycles, 1)
        check_range("enough", self.enough, 0)
        if self.order not in get_args(Order):
            raise ConfigError(unknown("order", self.order, get_args(Order)))

    def check(self, pattern: Pattern) -> None:
        """Every pattern will do."""

    def __call__(self, weight: Tensor, mask: Tensor, stats: Stats, pattern: Pattern) -> tuple[Tensor, dict[str, float]]:
        """As `Repruner`. notes: swaps made, and the mean |err_i| over its start."""
        total, variance = need_moments(stats, weight)
        dense = weight.detach().float()
        score = (Wanda() if self.order == "wanda" else RIA()).score(weight, stats)
        shift = dense * total
        key = shift / variance.clamp_min(1e-12).pow(self.power)
        width = pattern.m if isinstance(pattern, NM) else None
        repruned, swaps = reprune_shift(shift, key, score, mask, width, self.max_cycles, self.enough)
        before, after = ((shift * ~kept).sum(1).abs().mean() for kept in (mask, repruned))
        return repruned, {"swaps": float(swaps), "mean_shift_left": float(after / before.clamp_min(1e-30))}


@dataclass(frozen=True)
class DSnoTRia(DSnoT):
    """DSnoT with RIA's score as the order of the kept weights."""

    order: Order = "ria"


@dataclass(frozen=True)
class Swaps:
    """At most `sweeps` passes over the groups of M columns; it stops when a pass finds nothing."""

    sweeps: int = 3
    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        check_range("sweeps", self.sweeps, 1)

    def check(self, pattern: Pattern) -> None:
        """Raise ConfigError for what is not N:M."""
        if not isinstance(pattern, NM):
            raise ConfigError(f"--reprune swaps works in N:M groups, not in {pattern}; use dsnot")

    def __call__(self, weight: Tensor, mask: Tensor, stats: Stats, pattern: Pattern) -> tuple[Tensor, dict[str, float]]:
        """As `Repruner`, for N:M patterns. notes: swaps made. Raises ConfigError for another pattern."""
        self.check(pattern)
        gram = need_hessian(stats, weight).float()
        repruned, swaps = mask.clone(), 0
        for _ in range(self.sweeps):
            made = swap_groups(weight.detach().float(), repruned, gram, pattern)
            swaps += made
            if not made:
                break
        return repruned, {"swaps": float(swaps)}


REPRUNERS: dict[str, type[DSnoT] | type[Swaps]] = {"dsnot": DSnoT, "dsnot-ria": DSnoTRia, "swaps": Swaps}


def reprune_shift(
    shift: Tensor, key: Tensor, score: Tensor, mask: Tensor, width: int | None, max_cycles: int, enough: float
) -> tuple[Tensor, int]:
    """DSnoT's cycles for all rows at once -> (new mask, swaps made). All tensors (out, in).

    width: of the groups that a swap stays in; None for the whole row. A weight is swapped at most once.
    """
    kept, swaps = mask.clone(), 0
    error = (shift * ~mask).sum(1)
    growable, prunable = ~mask, mask.clone()
    for _ in range(max_cycles):
        rows = (error.abs() > enough).nonzero().squeeze(1)
        if not len(rows):
            break
        sign = error[rows].sign().unsqueeze(1)
        gain = (sign * key[rows]).masked_fill(~(growable[rows] & (sign * shift[rows] > 0)), -INFINITY)
        best, grown = gain.max(1)
        able = best > -INFINITY
        if not bool(able.any()):
            break
        rows, sign, grown = rows[able], sign[able], grown[able]
        cost, pruned = _partner(shift[rows], score[rows], prunable[rows], sign, grown, width).min(1)
        after = error[rows] + shift[rows, pruned] - shift[rows, grown]
        same_side = after * sign.squeeze(1) >= 0 if width is not None else torch.ones_like(after, dtype=torch.bool)
        accepted = (cost < INFINITY) & (after.abs() < error[rows].abs()) & same_side
        growable[rows, grown] = False
        rows, grown, pruned = rows[accepted], grown[accepted], pruned[accepted]
        kept[rows, grown], kept[rows, pruned], prunable[rows, pruned] = True, False, False
        error[rows] = after[accepted]
        swaps += len(rows)
    return kept, swaps


def _partner(shift: Tensor, score: Tensor, prunable: Tensor, sign: Tensor, grown: Tensor, width: int | None) -> Tensor:
    """The score of every weight (rows, in) that may be pruned for `grown` (rows,), infinite elsewhere."""
    if width is None:
        allowed = prunable & (sign * shift < 0)
    else:
        groups = torch.arange(shift.shape[1], device=shift.device) // width
        allowed = prunable & (groups == (grown // width).unsqueeze(1))
    return score.masked_fill(~allowed, INFINITY)


def swap_groups(weight: Tensor, mask: Tensor, gram: Tensor, pattern: Pattern) -> int:
    """One sweep of best swaps over the groups of an N:M pattern; changes `mask` (out, in), returns the swaps made.

    With g = d H, pruning p and growing q changes e by 2 w_p g_p + w_p^2 H_pp - 2 w_q g_q + w_q^2 H_qq - 2 w_p w_q H_pq.
    """
    assert isinstance(pattern, NM)
    width = pattern.m
    slope = (weight * ~mask) @ gram
    swaps = 0
    for start in range(0, weight.shape[1], width):
        here = slice(start, start + width)
        own, kept, diagonal = weight[:, here], mask[:, here], gram.diagonal()[here]
        prune = (2 * own * slope[:, here] + own.square() * diagonal).masked_fill(~kept, INFINITY)
        grow = (own.square() * diagonal - 2 * own * slope[:, here]).masked_fill(kept, INFINITY)
        change = prune.unsqueeze(2) + grow.unsqueeze(1) - 2 * own.unsqueeze(2) * own.unsqueeze(1) * gram[here, here]
        best, index = change.flatten(1).min(1)
        # Not every fall: below the rounding of the sums it may be none.
        rows = (best < -1e-6 * (own.square() * diagonal).sum(1)).nonzero().squeeze(1)
        pruned, grown = index[rows] // width, index[rows] % width
        mask[rows, start + pruned], mask[rows, start + grown] = False, True
        slope[rows] += own[rows, pruned, None] * gram[start + pruned] - own[rows, grown, None] * gram[start + grown]
        swaps += len(rows)
    return swaps
