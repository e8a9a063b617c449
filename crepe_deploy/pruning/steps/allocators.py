"""Allocation: how much of each layer is kept, under a global budget that holds exactly. Pure maths; the walk over the
model is in `allocation`.

Layers that must share a pattern form a `Unit` (q, k and v read one input and are served as one layer; so are gate and
up). An allocator looks at the dense blocks one at a time and then says which fraction each unit should keep:

- `owl` (Yin et al., ICML 2024): D_b = percentage of A = |W| ||X|| in block b above `threshold` times the block's mean;
  a block keeps 1 - s + its D scaled to [0, 2 spread], minus the mean of that.
- `alpha` (AlphaPruning, NeurIPS 2024): the power-law exponent of each matrix's eigenvalue spectrum; blocks with a
  larger mean exponent are pruned more, in proportion to a ratio between 1 - spread and 1 + spread.
- `error` (ours): the relative squared output error of each layer as a function of what it keeps, pruned by |W| ||X||;
  each next group of weights is given to the unit whose error it lowers most.

`fit_levels` then turns fractions into whole numbers whose total is exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.stats import Need, Stats, need_col_norm

from ..methods.base import check_range
from ..methods.numbers import exponent_of, scaled

GRID = 64  # points of an error curve where a pattern has no levels of its own
BINS = 100


@dataclass(frozen=True)
class Unit:
    """Layers of one block that share a level. cost: weights kept with each level; levels: at most, all kept."""

    block: int
    keys: tuple[str, ...]
    size: int
    levels: int

    @property
    def cost(self) -> int:
        return self.size // self.levels


class Allocator(Protocol):
    """`observe` one dense block at a time, then `fractions`: what each unit should keep."""

    needs: ClassVar[frozenset[Need]]

    def observe(self, layers: Sequence[Sequence[tuple[Tensor, Stats]]], levels: Sequence[int]) -> Any:
        """The weights (out, in) and statistics of each unit of a block, and its levels -> what to remember."""
        ...

    def fractions(self, seen: Sequence[Any], units: Sequence[Unit], keep: float) -> list[float]:
        """What was remembered of each block, all units, the global fraction kept -> a fraction for each unit."""
        ...


@dataclass(frozen=True)
class Owl:
    """`threshold` times a block's mean makes an outlier; `spread` is the largest change of the kept fraction."""

    threshold: float = 5.0
    spread: float = 0.08
    needs: ClassVar[frozenset[Need]] = frozenset({"col_norm"})

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 1)
        check_range("spread", self.spread, 0, 0.5)

    def observe(self, layers: Sequence[Sequence[tuple[Tensor, Stats]]], levels: Sequence[int]) -> float:
        """The block's percentage of outliers."""
        scores = [weight.float().abs() * need_col_norm(stats, weight) for unit in layers for weight, stats in unit]
        count = sum(score.numel() for score in scores)
        limit = self.threshold * float(sum(score.sum(dtype=torch.float64) for score in scores)) / count
        return 100 * sum(int((score > limit).sum()) for score in scores) / count

    def fractions(self, seen: Sequence[float], units: Sequence[Unit], keep: float) -> list[float]:
        """Blocks with more outliers keep more, all units of a block alike."""
        low, high = min(seen), max(seen)
        scaled = [(value - low) / (high - low) * 2 * self.spread if high > low else 0.0 for value in seen]
        mean = sum(scaled) / len(scaled)
        return [keep + scaled[unit.block] - mean for unit in units]


@dataclass(frozen=True)
class Alpha:
    """`spread`: how far the ratio of a block's sparsity to the mean goes from 1.

    Matrices of zeros have no spectrum and count for nothing; a block of nothing else is pruned as much as any.
    """

    spread: float = 0.3
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __post_init__(self) -> None:
        check_range("spread", self.spread, 0, 0.99)

    def observe(self, layers: Sequence[Sequence[tuple[Tensor, Stats]]], levels: Sequence[int]) -> float | None:
        """The mean exponent of the block's matrices; None where all are zero."""
        exponents = [power_law_exponent(weight) for unit in layers for weight, _ in unit if weight.any()]
        return sum(exponents) / len(exponents) if exponents else None

    def fractions(self, seen: Sequence[float | None], units: Sequence[Unit], keep: float) -> list[float]:
        """Blocks with a smaller exponent, a heavier tail, keep more, all units of a block alike."""
        known = [value for value in seen if value is not None] or [1.0]
        low, high = min(known), max(known)
        values = [high if value is None else value for value in seen]
        ratios = [
            1 - self.spread + (value - low) / (high - low) * 2 * self.spread if high > low else 1.0 for value in values
        ]
        total = sum(unit.size for unit in units)
        weighted = sum(unit.size * ratios[unit.block] for unit in units)
        return [1 - (1 - keep) * ratios[unit.block] * total / weighted for unit in units]


@dataclass(frozen=True)
class Error:
    """`spread`: how far the kept fraction of a unit goes from the global one."""

    spread: float = 0.125
    needs: ClassVar[frozenset[Need]] = frozenset({"col_norm"})

    def __post_init__(self) -> None:
        check_range("spread", self.spread, 0, 0.5)

    def observe(self, layers: Sequence[Sequence[tuple[Tensor, Stats]]], levels: Sequence[int]) -> list[Tensor]:
        """For each unit the sum of its layers' error curves, on the host."""
        return [
            torch.stack([error_curve(weight, stats, count) for weight, stats in unit]).sum(0).cpu()
            for unit, count in zip(layers, levels, strict=True)
        ]

    def fractions(self, seen: Sequence[list[Tensor]], units: Sequence[Unit], keep: float) -> list[float]:
        """The fractions at which one more weight lowers the error of every unit by the same amount, or a limit holds.

        Curves are convex, so that price is found by halving.
        """
        curves = [curve for block in seen for curve in block]
        slopes = [
            -(curve[1:] - curve[:-1]) * (len(curve) - 1) / unit.size for curve, unit in zip(curves, units, strict=True)
        ]
        total = sum(unit.size for unit in units)
        low, high = 0.0, max(float(slope.max()) for slope in slopes)
        for _ in range(100):
            price = (low + high) / 2
            fractions = [self._at(slope, price, keep) for slope in slopes]
            if sum(fraction * unit.size for fraction, unit in zip(fractions, units, strict=True)) > keep * total:
                low = price
            else:
                high = price
        return fractions

    def _at(self, slope: Tensor, price: float, keep: float) -> float:
        fraction = float((slope > price).sum()) / len(slope)
        return min(max(fraction, keep - self.spread), keep + self.spread)


ALLOCATORS: dict[str, type[Owl] | type[Alpha] | type[Error]] = {"owl": Owl, "alpha": Alpha, "error": Error}


def error_curve(weight: Tensor, stats: Stats, levels: int) -> Tensor:
    """(G + 1,) fp64, entry g the relative squared output error when g of G parts of the weights are kept.

    G is `levels` up to 64, with what each group of `levels` columns keeps chosen by |W| ||X||; above, G is 64 and the
    choice is by row. The inputs are taken as uncorrelated: the diagonal of the Gram matrix.
    """
    weight = scaled(weight, exponent_of(weight))
    parts = weight.float().square() * need_col_norm(stats, weight).square()
    width = levels if levels <= GRID else weight.shape[1]
    ordered = parts.reshape(-1, width).sort(dim=1, descending=True).values.sum(0, dtype=torch.float64)
    left = ordered.sum() - torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    if levels > GRID:
        points = torch.linspace(0, width, GRID + 1).round().long().to(left.device)
        left = left[points]
    return (left / left[0].clamp_min(1e-30)).clamp_min(0)


def power_law_exponent(weight: Tensor) -> float:
    """The exponent alpha of the tail of W's squared singular values, fitted as AlphaPruning does.

    For each candidate xmin = lam_i with t eigenvalues at or above it, alpha = 1 + t / (sum log lam - t log lam_i); the
    candidate with the smallest Kolmogorov-Smirnov distance is kept. Candidates lie between 0.95 and 1.5 times the
    spectrum's peak; the reference code compares the lower bound in log10 with plain values, which is not repeated here.
    """
    matrix = weight.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values = torch.linalg.eigvalsh(gram)
    values = values[values > values[-1] * 1e-12]
    logs = values.log()
    histogram = torch.histc(logs, BINS)
    step = float(logs[-1] - logs[0]) / BINS
    peak = math.exp(float(logs[0]) + (int(histogram.argmax()) + 0.5) * step)
    candidates = ((values >= 0.95 * peak) & (values <= 1.5 * peak)).nonzero().squeeze(1).tolist()
    best, exponent = math.inf, 1.0
    for index in candidates or [0]:
        tail = logs[index:] - logs[index]
        spread = float(tail.sum())
        if spread <= 0:
            continue
        alpha = 1 + len(tail) / spread
        fitted = 1 - torch.exp(tail * (1 - alpha))
        observed = torch.arange(len(tail), dtype=torch.float64, device=tail.device) / len(tail)
        distance = float((fitted - observed).abs().max())
        if distance < best:
            best, exponent = distance, alpha
    return exponent


def fit_levels(ideal: Sequence[float], costs: Sequence[int], high: Sequence[int], total: int) -> list[int]:
    """Whole levels near `ideal`, 1 <= level <= high, with sum(level * cost) == total exactly.

    A common relative shift brings the rounded sum near the total; single steps, as few as possible, do the rest, up
    where the ideal is furthest above and down where it is furthest below. Raises ConfigError if no such levels exist.
    """

    def levels_at(shift: float) -> list[int]:
        return [min(max(1, math.floor(value + shift * most)), most) for value, most in zip(ideal, high, strict=True)]

    def sum_of(levels: Sequence[int]) -> int:
        return sum(level * cost for level, cost in zip(levels, costs, strict=True))

    low_shift, high_shift = -1.0, 1.0
    for _ in range(60):
        shift = (low_shift + high_shift) / 2
        low_shift, high_shift = (shift, high_shift) if sum_of(levels_at(shift)) <= total else (low_shift, shift)
    levels = levels_at(low_shift)
    for cost in _steps(total - sum_of(levels), sorted(set(costs))):
        _move(levels, ideal, costs, high, cost)
    if sum_of(levels) != total:
        raise ConfigError(f"no allocation keeps exactly {total} weights: too few layers can give or take")
    return levels


def _steps(missing: int, costs: Sequence[int]) -> list[int]:
    """The fewest signed costs whose sum is `missing`; empty if there are none."""
    reach = abs(missing) + max(costs)
    before: dict[int, int] = {0: 0}
    queue = deque([0])
    while queue and missing not in before:
        here = queue.popleft()
        for step in [*costs, *(-cost for cost in costs)]:
            if here + step not in before and abs(here + step) <= reach:
                before[here + step] = step
                queue.append(here + step)
    steps: list[int] = []
    while missing in before and missing:
        steps.append(before[missing])
        missing -= before[missing]
    return steps


def _move(levels: list[int], ideal: Sequence[float], costs: Sequence[int], high: Sequence[int], step: int) -> None:
    """Raise or lower, by one, the level of that cost which gains most; does nothing where all are at their limit."""
    sign = 1 if step > 0 else -1
    able = [index for index, cost in enumerate(costs) if cost == abs(step) and 1 <= levels[index] + sign <= high[index]]
    if able:
        chosen = max(able, key=lambda index: sign * (ideal[index] - levels[index]) / high[index])
        levels[chosen] += sign
