"""Comparing noisy samples: log-ratios over rounds, percentiles with intervals, noise floors, several tests at once.

The unit of independence is the round, not the request: both arms of a round met the same neighbours on the machine.

Few rounds are the rule here, and a plain percentile bootstrap of five values covers 83 % where it says 95 %. Its two
half-widths are therefore stretched by what Student's t and the lost degree of freedom ask for; with normal samples
the result is the t interval, with skewed ones it keeps the bootstrap's asymmetry, and any level can be read off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit  # Student's t, its distribution and its quantile

from .metrics import METRICS, common_rounds, rounds_of
from .result import Interval, Series

RESAMPLES: Final = 2000
LEVEL: Final = 0.95
POWER: Final = 0.8
_Z: Final = NormalDist().inv_cdf((1 + LEVEL) / 2)

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LogMean:
    """A mean of logarithms with its standard error on either side (they differ where the samples are skewed).

    `freedom` is infinite for what is known exactly, and 0 where one value says nothing about its spread.
    """

    mean: float
    below: float
    above: float
    freedom: float

    def interval(self, level: float = LEVEL) -> Interval:
        """The ratio, no longer its logarithm, with its two-sided interval; without bounds where there is no spread."""
        if self.freedom < 1:
            return Interval(value=math.exp(self.mean))
        t = float(stdtrit(self.freedom, (1 + level) / 2))
        low, high = self.mean - t * self.below, self.mean + t * self.above
        return Interval(value=math.exp(self.mean), low=_exp(low), high=_exp(high))

    def p_above(self, limit: float) -> float:
        """One-sided p-value against "the ratio is at most `limit`"; 1 where there is no spread to judge by."""
        if self.freedom < 1:
            return 1.0
        excess = self.mean - math.log(limit)
        if self.below == 0 or excess <= 0:
            return 0.0 if excess > 0 else 1.0
        return float(stdtr(self.freedom, -excess / self.below))

    def inverse(self) -> LogMean:
        """Of one over the ratio."""
        return LogMean(-self.mean, self.above, self.below, self.freedom)

    def over(self, other: LogMean) -> LogMean:
        """Of the ratio of two independent ones, with Welch and Satterthwaite's degrees of freedom."""
        below, above = math.hypot(self.below, other.above), math.hypot(self.above, other.below)
        parts = [(max(part.below, part.above) ** 2, part.freedom) for part in (self, other)]
        if any(freedom < 1 for _, freedom in parts):
            return LogMean(self.mean - other.mean, below, above, 0)
        share = sum(variance**2 / freedom for variance, freedom in parts)
        freedom = sum(variance for variance, _ in parts) ** 2 / share if share else math.inf
        return LogMean(self.mean - other.mean, below, above, freedom)


def log_mean(values: Sequence[float], seed: int = 0) -> LogMean:
    """The mean of the logarithms of independent values. Raises ValueError for none, or any that is not positive."""
    samples = np.asarray(values, dtype=np.float64)
    if not samples.size or not np.isfinite(samples).all() or samples.min() <= 0:
        raise ValueError("a ratio needs positive, finite samples, at least one")
    logs = np.log(samples)
    mean = float(logs.mean())
    if len(logs) < 2:
        return LogMean(mean, 0.0, 0.0, 0)
    if logs.min() == logs.max():
        return LogMean(mean, 0.0, 0.0, len(logs) - 1)
    low, high = bootstrap(logs, lambda draws: np.asarray(draws.mean(-1)), seed) or (mean, mean)
    stretch = math.sqrt(len(logs) / (len(logs) - 1)) / _Z
    return LogMean(mean, max(mean - low, 0.0) * stretch, max(high - mean, 0.0) * stretch, len(logs) - 1)


def positive(*arms: Sequence[float]) -> bool:
    """Whether each has samples, and none but positive ones: what a ratio can be taken of."""
    return all(len(arm) and min(arm) > 0 for arm in arms)


def paired_log_mean(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> LogMean:
    """Of numerator / denominator, round by round. Raises ValueError for samples that do not pair."""
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} and {len(denominator)} samples do not pair")
    if any(not value > 0 for value in denominator):
        raise ValueError("a ratio needs positive, finite samples, at least one")
    return log_mean([above / below for above, below in zip(numerator, denominator, strict=True)], seed)


def paired_ratio(
    numerator: Sequence[float], denominator: Sequence[float], seed: int = 0, level: float = LEVEL
) -> Interval:
    """Geometric mean over rounds of numerator / denominator, with its interval over rounds.

    Raises ValueError for samples that do not pair or are not positive.
    """
    return paired_log_mean(numerator, denominator, seed).interval(level)


def quantile(values: Sequence[float], level: float, seed: int = 0) -> Interval:
    """The quantile of independent samples with its bootstrap interval. Raises ValueError for no samples."""
    samples = np.asarray(values, dtype=np.float64)
    if not samples.size:
        raise ValueError("no samples")
    interval = bootstrap(samples, lambda draws: np.asarray(np.quantile(draws, level, axis=-1)), seed)
    low, high = interval or (None, None)
    return Interval(value=float(np.quantile(samples, level)), low=low, high=high)


def pooled_quantile(rounds: Sequence[Sequence[float]], at: float, level: float = LEVEL, seed: int = 0) -> Interval:
    """The quantile `at` of all requests, its interval by resampling whole rounds. Raises ValueError for no samples."""
    arrays = [np.asarray(values, dtype=np.float64) for values in rounds if len(values)]
    if not arrays:
        raise ValueError("no samples")
    value = float(np.quantile(np.concatenate(arrays), at))
    if len(arrays) < 2:
        return Interval(value=value)
    picks = np.random.default_rng(seed).integers(len(arrays), size=(RESAMPLES, len(arrays)))
    drawn = [float(np.quantile(np.concatenate([arrays[i] for i in pick]), at)) for pick in picks]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=value, low=float(low), high=float(high))


def undisturbed(values: Sequence[float]) -> float:
    """The first decile: what work that is always the same takes where nothing else on the machine interrupts it.

    Unlike the least of all it does not fall with the number of values.
    """
    return float(np.quantile(np.asarray(values, dtype=np.float64), 0.1))


def bootstrap(
    values: Array, statistic: Callable[[Array], npt.NDArray[Any]], seed: int = 0, level: float = LEVEL
) -> tuple[float, float] | None:
    """Percentile interval of `statistic` (over the last axis) of resamples; None for fewer than two values."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(statistic(values[draws]), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def noise_floor(first: Series, second: Series) -> dict[str, float]:
    """What two equal candidates differ by: "POINT/METRIC" -> half-width of the 95 % interval of their log-ratio.

    Metrics that fewer than two rounds of both have, or that took no time, are left out. Raises ValueError for series
    of two points.
    """
    if first.point != second.point:
        raise ValueError(f"series of two points do not pair: {first.point} and {second.point}")
    floors = {}
    for name, metric in METRICS.items():
        pairs = common_rounds(rounds_of(first, metric), rounds_of(second, metric))
        if len(pairs[0]) >= 2 and positive(*pairs):
            floors[f"{first.point}/{name}"] = half_width(paired_log_mean(*pairs))
    return floors


def half_width(estimate: LogMean, level: float = LEVEL) -> float:
    """Half the width of the interval, of the logarithm."""
    return float(stdtrit(estimate.freedom, (1 + level) / 2)) * (estimate.below + estimate.above) / 2


def detectable(noise: float, power: float = POWER) -> float:
    """The least budget, as a fraction, that an unchanged candidate passes with this probability at this noise.

    The interval's upper end must stay within the budget: half-width + z(power) standard errors. A change is caught
    with the same probability once it exceeds the budget by as much again.
    """
    return math.expm1(noise * (1 + NormalDist().inv_cdf(power) / _Z))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values: rejecting those at most alpha keeps the chance of any false one at most alpha."""
    adjusted: dict[str, float] = {}
    worst = 0.0
    for index, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - index) * p_values[name]))
        adjusted[name] = worst
    return adjusted


def _exp(value: float) -> float:
    return math.exp(max(-700.0, min(value, 700.0)))
