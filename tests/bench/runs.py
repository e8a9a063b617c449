"""Runs made of given numbers, for tests of what judges and shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crepe_deploy.bench.run.result import (
    Candidate,
    Environment,
    Host,
    Interval,
    Memory,
    Point,
    Quality,
    Request,
    Run,
    Series,
    Visit,
    Workload,
)

POINT = Point(name="p", prompt_tokens=8, output_tokens=5)
HOST = Host(cpu="Xeon", isa="amx", cores=2, memory_bytes=8 << 30, system="Linux 6")
CONVENTION = {"text": "wiki", "window": 512}


def request(tpot_s: float, ttft_s: float = 0.1, **changes: Any) -> Request:
    """A request of POINT that took these times."""
    fields = {
        "prompt_tokens": 8, "output_tokens": 5, "ttft_s": ttft_s, "itl_s": [tpot_s] * 4,
        "latency_s": ttft_s + 4 * tpot_s,
    }  # fmt: skip
    return Request(**(fields | changes))


def series(point: str, tpots_s: Sequence[float], ttft_s: float = 0.1, **changes: Any) -> Series:
    """One visit of one request a round, at these times per output token."""
    requests = [request(float(value), ttft_s, **changes) for value in tpots_s]
    visits = [Visit(round=index, duration_s=one.latency_s or 1, requests=[one]) for index, one in enumerate(requests)]
    return Series(point=point, visits=visits)


def quality(ppl: float, ratio: tuple[float, float, float] = (1.0, 1.0, 1.0), **changes: Any) -> Quality:
    """A perplexity and its ratio to dense as (low, value, high)."""
    low, value, high = ratio
    fields = {
        "convention": CONVENTION, "perplexity": Interval(value=ppl, low=0.9 * ppl, high=1.1 * ppl),
        "perplexity_ratio": Interval(value=value, low=low, high=high),
        "kl_mean": Interval(value=0.1, low=0.09, high=0.11), "same_top": Interval(value=0.8, low=0.79, high=0.81),
    }  # fmt: skip
    return Quality(**(fields | changes))


def candidate(name: str, tpots_s: Sequence[float], **changes: Any) -> Candidate:
    """A candidate at POINT with these times per output token, one a round."""
    fields = {
        "name": name, "engine": "vllm", "kind": name, "folder": f"/m/{name}", "model_sha256": name, "load_s": [1.0],
        "memory": Memory(weights_bytes=1000, loaded_bytes=2000, peak_bytes=3000), "series": [series("p", tpots_s)],
    }  # fmt: skip
    return Candidate(**(fields | changes))


def run(candidates: Sequence[Candidate], host: Mapping[str, Any] | None = None, **changes: Any) -> Run:
    """A run of these candidates; the first is the baseline."""
    environment = Environment(
        host=HOST.model_copy(update=dict(host or {})), versions={"torch": "2.13"}, threads=2, load=(0.1, 0.2)
    )
    fields = {
        "name": "test", "created": "2026-01-01T00:00:00Z", "command": "crepe-deploy bench", "seconds": 1.0,
        "environment": environment, "workload": Workload(points=[POINT], seed=0, dtype="bfloat16"),
        "baseline": candidates[0].name, "candidates": list(candidates),
    }  # fmt: skip
    return Run(**(fields | changes))
