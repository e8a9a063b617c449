"""Comparing noisy samples: paired log-ratios over rounds, percentiles with intervals, the noise floor of a machine.

The unit of independence is the round, not the request: both arms of a round met the same neighbours on the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .result import Interval

RESAMPLES: Final = 2000
LEVEL: Final = 0.95

Array = npt.NDArray[np.float64]


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float], seed: int = 0) -> Interval:
    """Geometric mean over rounds of numerator / denominator, with its bootstrap interval over rounds.

    Raises ValueError for samples that do not pair or are not positive.
    """
    if len(numerator) != len(denominator) or not numerator:
        raise ValueError(f"{len(numerator)} and {len(denominator)} samples do not pair")
    arms = [np.asarray(values, dtype=np.float64) for values in (numerator, denominator)]
    if any(not np.isfinite(arm).all() or arm.min() <= 0 for arm in arms):
        raise ValueError("a ratio needs positive, finite samples")
    logs = np.log(arms[0]) - np.log(arms[1])
    interval = bootstrap(logs, lambda draws: np.asarray(draws.mean(-1)), seed)
    low, high = (None, None) if interval is None else np.exp(interval)
    return Interval(value=float(np.exp(logs.mean())), low=low, high=high)


def quantile(values: Sequence[float], level: float, seed: int = 0) -> Interval:
    """The quantile of independent samples with its bootstrap interval. Raises ValueError for no samples."""
    found = np.asarray(values, dtype=np.float64)
    if not found.size:
        raise ValueError("no samples")
    interval = bootstrap(found, lambda draws: np.asarray(np.quantile(draws, level, axis=-1)), seed)
    low, high = interval or (None, None)
    return Interval(value=float(np.quantile(found, level)), low=low, high=high)


def bootstrap(
    values: Array, statistic: Callable[[Array], npt.NDArray[Any]], seed: int = 0, level: float = LEVEL
) -> tuple[float, float] | None:
    """Percentile interval of `statistic` (over the last axis) of resamples; None for fewer than two values."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(statistic(values[draws]), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
