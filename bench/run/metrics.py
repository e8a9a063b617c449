"""What a visit's samples say: one number for each metric, with its unit and which way is better.

Percentiles are taken over the tokens (ITL) or requests (TTFT, latency) of one visit; comparisons are then made over
visits, for samples within one visit are not independent. Failed requests count as errors and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

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


def common_rounds(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """The figures of two arms in the rounds that both have, in order: what is compared pairwise."""
    shared = sorted(first.keys() & second.keys())
    return [first[index] for index in shared], [second[index] for index in shared]


def time_per_token(request: Request) -> float | None:
    """Seconds for each output token after the first; None where there is none."""
    if request.latency_s is None or request.ttft_s is None or request.output_tokens < 2:
        return None
    return (request.latency_s - request.ttft_s) / (request.output_tokens - 1)


SAMPLES: Final[dict[str, Callable[[Visit], list[float]]]] = {
    "ttft_s": lambda visit: [r.ttft_s for r in succeeded(visit) if r.ttft_s is not None],
    "tpot_s": lambda visit: [time for r in succeeded(visit) if (time := time_per_token(r)) is not None],
    "itl_s": gaps,
    "latency_s": lambda visit: [r.latency_s for r in succeeded(visit) if r.latency_s is not None],
}


def _of_samples(name: str, statistic: Callable[[list[float]], Any]) -> Callable[[Visit], float | None]:
    """A statistic of a visit's samples of this name."""

    def of(visit: Visit) -> float | None:
        samples = SAMPLES[name](visit)
        return float(statistic(samples)) if samples else None

    return of


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _prefill(visit: Visit) -> float | None:
    return _median([r.sequences * r.prompt_tokens / r.ttft_s for r in succeeded(visit) if r.ttft_s])


def _decode(visit: Visit) -> float | None:
    times = [(request, time_per_token(request)) for request in succeeded(visit)]
    return _median([request.sequences / time for request, time in times if time])


def _throughput(visit: Visit) -> float | None:
    tokens = sum(request.sequences * request.output_tokens for request in succeeded(visit))
    return tokens / visit.duration_s if tokens and visit.duration_s > 0 else None


METRICS: Final[dict[str, Metric]] = {
    "ttft_s": Metric("s", "lower", "time to first token", _of_samples("ttft_s", np.median)),
    "tpot_s": Metric("s", "lower", "time per output token", _of_samples("tpot_s", np.median)),
    "itl_mean_s": Metric("s", "lower", "inter-token latency, mean", _of_samples("itl_s", np.mean)),
    "itl_p50_s": Metric("s", "lower", "inter-token latency, p50", _of_samples("itl_s", partial(np.quantile, q=0.5))),
    "itl_p90_s": Metric("s", "lower", "inter-token latency, p90", _of_samples("itl_s", partial(np.quantile, q=0.9))),
    "itl_p99_s": Metric("s", "lower", "inter-token latency, p99", _of_samples("itl_s", partial(np.quantile, q=0.99))),
    "latency_s": Metric("s", "lower", "end-to-end latency", _of_samples("latency_s", np.median)),
    "prefill_tokens_per_s": Metric("tokens/s", "higher", "prefill", _prefill),
    "decode_tokens_per_s": Metric("tokens/s", "higher", "decode", _decode),
    "output_tokens_per_s": Metric("tokens/s", "higher", "output throughput", _throughput),
}
