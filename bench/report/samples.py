"""Pooled latency samples: percentiles with intervals that respect rounds, and distribution curves.

Samples inside a round depend on each other, so whole rounds are resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from ..run.metrics import SAMPLES
from ..run.result import Interval, Series, Visit

RESAMPLES: Final = 400
LEVELS: Final[dict[str, float]] = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Latency:
    """A kind of latency sample. `of` lists a visit's samples in seconds."""

    title: str
    gloss: str
    of: Callable[[Visit], list[float]]


LATENCIES: Final[dict[str, Latency]] = {
    "ttft": Latency("TTFT", "time to first token: from sending the prompt to the first new token", SAMPLES["ttft_s"]),
    "tpot": Latency("TPOT", "time per output token after the first, a mean for each request", SAMPLES["tpot_s"]),
    "itl": Latency("ITL", "inter-token latency: the gap between two tokens of one answer", SAMPLES["itl_s"]),
}


@dataclass(frozen=True)
class Pool:
    """All samples of a series in ascending order, and the round of each."""

    values: Array
    rounds: npt.NDArray[np.int64]

    @property
    def round_count(self) -> int:
        return len(np.unique(self.rounds))


def pool(series: Series, latency: Latency) -> Pool:
    """Every sample of a series."""
    pairs = [(time, visit.round) for visit in series.visits for time in latency.of(visit)]
    values = np.asarray([time for time, _ in pairs], dtype=np.float64)
    indices = np.asarray([index for _, index in pairs], dtype=np.int64)
    order = np.argsort(values, kind="stable")
    return Pool(values[order], indices[order])


def enough_for(level: float, samples: int) -> bool:
    """A percentile needs at least one sample beyond it: 10 for p90, 100 for p99."""
    return samples >= round(1 / (1 - level))


def summarise(samples: Pool, seed: int = 0) -> Mapping[str, Interval]:
    """Mean and the percentiles there are samples enough for, each with its interval over rounds."""
    if not samples.values.size:
        return {}
    levels = [level for level in LEVELS.values() if enough_for(level, samples.values.size)]
    names = ["mean", *(name for name, level in LEVELS.items() if level in levels)]
    central = [float(samples.values.mean()), *(float(np.quantile(samples.values, level)) for level in levels)]
    if samples.round_count < 2:
        return {name: Interval(value=value) for name, value in zip(names, central, strict=True)}
    _, members = np.unique(samples.rounds, return_inverse=True)
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(samples.round_count, size=samples.round_count)
        counts = np.bincount(drawn, minlength=samples.round_count)
        draws.append(_statistics(samples.values, counts[members].astype(np.float64), levels))
    low, high = np.quantile(np.asarray(draws), [0.025, 0.975], axis=0)
    return {
        name: Interval(value=value, low=float(low[i]), high=float(high[i]))
        for i, (name, value) in enumerate(zip(names, central, strict=True))
    }


def _statistics(values: Array, weights: Array, levels: list[float]) -> list[float]:
    """The mean, then each quantile, of values in ascending order that count `weights` times."""
    total = np.cumsum(weights)
    ranks = [min(int(np.searchsorted(total, level * total[-1])), len(values) - 1) for level in levels]
    return [float(values @ weights / total[-1]), *(float(values[rank]) for rank in ranks)]
