"""What a visit's samples say: one number for each metric, with its unit and which way is better.

Percentiles are taken over the tokens (ITL) or requests (TTFT, latency) of one visit; comparisons are then made over
visits, for samples within one visit are not independent. Failed requests count as errors and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from .result import Request, Series, Visit


@dataclass(frozen=True)
class Metric:
    """A figure of one visit: `of` returns it, or None where the visit has no sample of it."""

    unit: str
    better: Literal["lower", "higher"]
    title: str
    of: Callable[[Visit], float | None]


def succeeded(visit: Visit) -> list[Request]:
    """The requests whose times count."""
    return [request for request in visit.requests if request.error is None]


def errors(series: Series) -> list[str]:
    """What failed requests said, in order."""
    return [request.error for visit in series.visits for request in visit.requests if request.error is not None]


def gaps(visit: Visit) -> list[float]:
    """All inter-token times of a visit, in seconds."""
    return [gap for request in succeeded(visit) for gap in request.itl_s]


def by_round(series: Series, metric: Metric) -> list[float]:
    """One figure a round, its visits' mean; rounds without one are left out."""
    return list(rounds_of(series, metric).values())


def rounds_of(series: Series, metric: Metric) -> dict[int, float]:
    """The same by the number of the round, in order: what two arms are paired by."""
    rounds: dict[int, list[float]] = {}
    for visit in series.visits:
        value = metric.of(visit)
        if value is not None:
            rounds.setdefault(visit.round, []).append(value)
    return {index: float(np.mean(rounds[index])) for index in sorted(rounds)}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def _quantile(level: float) -> Callable[[Visit], float | None]:
    def of(visit: Visit) -> float | None:
        found = gaps(visit)
        return float(np.quantile(found, level)) if found else None

    return of


def _ttft(visit: Visit) -> float | None:
    return _median([request.ttft_s for request in succeeded(visit)])


def _tpot(visit: Visit) -> float | None:
    return _median([time_per_token(request) for request in succeeded(visit)])


def time_per_token(request: Request) -> float | None:
    """Seconds for each output token after the first; None where there is none."""
    if request.latency_s is None or request.ttft_s is None or request.output_tokens < 2:
        return None
    return (request.latency_s - request.ttft_s) / (request.output_tokens - 1)


def _mean_gap(visit: Visit) -> float | None:
    found = gaps(visit)
    return float(np.mean(found)) if found else None


def _latency(visit: Visit) -> float | None:
    return _median([request.latency_s for request in succeeded(visit)])


def _prefill(visit: Visit) -> float | None:
    return _median([r.sequences * r.prompt_tokens / r.ttft_s for r in succeeded(visit) if r.ttft_s])


def _decode(visit: Visit) -> float | None:
    times = [(request, time_per_token(request)) for request in succeeded(visit)]
    return _median([request.sequences / time for request, time in times if time])


def _throughput(visit: Visit) -> float | None:
    tokens = sum(request.sequences * request.output_tokens for request in succeeded(visit))
    return tokens / visit.duration_s if tokens and visit.duration_s > 0 else None


METRICS: Final[dict[str, Metric]] = {
    "ttft_s": Metric("s", "lower", "time to first token", _ttft),
    "tpot_s": Metric("s", "lower", "time per output token", _tpot),
    "itl_mean_s": Metric("s", "lower", "inter-token latency, mean", _mean_gap),
    "itl_p50_s": Metric("s", "lower", "inter-token latency, p50", _quantile(0.5)),
    "itl_p90_s": Metric("s", "lower", "inter-token latency, p90", _quantile(0.9)),
    "itl_p99_s": Metric("s", "lower", "inter-token latency, p99", _quantile(0.99)),
    "latency_s": Metric("s", "lower", "end-to-end latency", _latency),
    "prefill_tokens_per_s": Metric("tokens/s", "higher", "prefill", _prefill),
    "decode_tokens_per_s": Metric("tokens/s", "higher", "decode", _decode),
    "output_tokens_per_s": Metric("tokens/s", "higher", "output throughput", _throughput),
}
