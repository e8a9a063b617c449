"""A made-up benchmark run, shaped like a real one: five candidates, batches and a server, thousands of samples.

Every number is invented; only reports about reports may be made of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from crepe_deploy.bench.run.result import (
    Candidate,
    Environment,
    Host,
    Interval,
    Layer,
    Memory,
    Point,
    Quality,
    Request,
    Run,
    Series,
    Visit,
    Workload,
)

POINTS = (
    Point(name="b1", prompt_tokens=128, output_tokens=64, batch=1),
    Point(name="b4", prompt_tokens=128, output_tokens=64, batch=4),
    Point(name="b16", prompt_tokens=128, output_tokens=64, batch=16),
    Point(name="prefill", prompt_tokens=512, output_tokens=1, batch=1),
    Point(name="served-4", prompt_tokens=128, output_tokens=32, concurrency=4, requests=8),
)
# name, kind, method, pattern, format, bytes, time per token over dense, perplexity ratio, KL
CANDIDATES: tuple[tuple[str, str, str | None, str | None, str, int, float, float, float], ...] = (
    ("dense", "dense", None, None, "dense", 269_000_000, 1.0, 1.0, 0.0),
    ("ria-2:4", "RIA 2:4 dense", "ria", "2:4", "dense", 269_000_000, 1.0, 6.4, 1.95),
    ("crepe-2:4-packed", "CRePE 2:4 packed", "crepe", "2:4", "packed", 176_000_000, 0.66, 6.2, 1.92),
    ("crepe-16:32-packed", "CRePE 16:32 packed", "crepe", "16:32", "packed", 176_000_000, 0.64, 2.56, 1.03),
    ("int8", "dense int8", None, None, "int8", 165_000_000, 0.72, 1.006, 0.004),
)
HOST = Host(cpu="Made-up CPU 9000", isa="amx", cores=2, memory_bytes=8 << 30, system="Linux 6.1")
CONVENTION = {"text": "wiki.test.txt", "tokens": 8192, "window": 512, "stride": 512, "dtype": "bfloat16"}


def made_up_run(seed: int = 0, rounds: int = 6, commit: str | None = "0123456789", **changes: Any) -> Run:
    """A run with `rounds` ABBA rounds; equal seeds give equal runs."""
    generator = np.random.default_rng(seed)
    moods = np.exp(generator.normal(0, 0.1, size=rounds))
    fields: dict[str, Any] = {
        "name": "smollm2-made-up",
        "created": f"2026-01-{1 + seed:02d}T10:00:00Z",
        "command": "crepe-deploy bench configs/made-up.yaml --out run.json",
        "seconds": 1234.5,
        "environment": Environment(
            host=HOST, versions={"crepe-deploy": "0.1.0", "torch": "2.13.0", "vllm": "0.32.0"}, threads=2,
            clock_mhz=2400.0, load=(0.4, 1.9), variables={"OMP_NUM_THREADS": "2"}, commit=commit,
        ),
        "workload": Workload(points=list(POINTS), seed=0, dtype="bfloat16", options={"prefix_cache": False}),
        "baseline": "dense",
        "candidates": [_candidate(i, generator, moods) for i in range(len(CANDIDATES))],
        "noise": {f"{point.name}/{name}": 0.03 for point in POINTS for name in ("tpot_s", "ttft_s")},
    }  # fmt: skip
    return Run(**(fields | changes))


def _candidate(index: int, generator: np.random.Generator, moods: np.ndarray) -> Candidate:
    name, kind, method, pattern, form, size, time, perplexity, kl = CANDIDATES[index]
    return Candidate(
        name=name, engine="vllm", kind=kind, method=method, pattern=pattern, format=form, folder=f"out/{name}",
        model_sha256=f"{index:x}" * 64, load_s=[3.1 + index / 10, 3.3],
        memory=Memory(
            weights_bytes=size, linears_bytes=size - 57_000_000, loaded_bytes=size + 600_000_000,
            peak_bytes=size + 900_000_000, kv_token_bytes=46_080,
        ),
        quality=Quality(
            convention=CONVENTION, perplexity=_around(27.6 * perplexity, 0.15),
            perplexity_ratio=_around(perplexity, 0.03) if index else None,
            kl_mean=_around(kl, 0.05) if index else None, kl_p99=_around(5 * kl, 0.1) if index else None,
            same_top=Interval(value=1 - kl / 4, low=1 - kl / 3.9, high=1 - kl / 4.1) if index else None,
        ),
        layers=_layers(method is not None, generator), notes={"kernels": "made up"},
        series=[_series(point, time, generator, moods) for point in POINTS],
    )  # fmt: skip


def _around(value: float, share: float) -> Interval:
    return Interval(value=value, low=value * (1 - share), high=value * (1 + share))


def _layers(pruned: bool, generator: np.random.Generator) -> list[Layer]:
    shapes = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "mlp.up_proj": (1536, 576)}
    return [
        Layer(
            name=f"model.layers.{block}.{name}", shape=shape, sparsity=0.5 if pruned else 0.0,
            pattern="2:4" if pruned else None,
            error=float(0.2 + 0.005 * block + 0.02 * generator.random()) if pruned else None,
        )
        for block in range(30) for name, shape in shapes.items()
    ]  # fmt: skip


def _series(point: Point, time: float, generator: np.random.Generator, moods: np.ndarray) -> Series:
    visits = []
    for index, mood in enumerate(moods):
        for _ in range(2):
            requests = [_request(point, time * mood, generator) for _ in range(point.requests)]
            together = point.concurrency or 1
            total = sum(request.latency_s or 0.0 for request in requests) / together
            visits.append(Visit(round=index, duration_s=total, requests=requests))
    return Series(point=point.name, visits=visits)


def _request(point: Point, time: float, generator: np.random.Generator) -> Request:
    sequences = point.batch
    load = point.concurrency or sequences
    itl = 0.011 * time * (1 + 0.06 * load) * np.exp(generator.gamma(2, 0.06, size=point.output_tokens - 1))
    ttft = float(
        0.0004 * point.prompt_tokens * (0.4 + 0.6 * sequences) * (0.9 + 0.1 * time) * generator.uniform(1, 1.1)
    )
    return Request(
        sequences=sequences, prompt_tokens=point.prompt_tokens, output_tokens=point.output_tokens, ttft_s=ttft,
        itl_s=[float(gap) for gap in itl], latency_s=ttft + float(itl.sum()),
    )  # fmt: skip


def without(run: Run, **changes: Any) -> Run:
    """The run with fields of every candidate replaced."""
    return run.model_copy(update={"candidates": [c.model_copy(update=changes) for c in run.candidates]})


def small(seed: int = 0, **changes: Any) -> Run:
    """A made-up run of two candidates at one point, of which a report is quick."""
    run = without(made_up_run(seed, rounds=2, **changes), layers=[], quality=None)
    candidates = [c.model_copy(update={"series": c.series[:1]}) for c in run.candidates[::4]]
    return run.model_copy(update={"candidates": candidates})


def charted(seed: int = 0) -> Run:
    """A made-up run as small as one can be of which every kind of chart is drawn; two of them make a history."""
    run = made_up_run(seed, rounds=2)
    points = run.workload.points[:2]
    candidates = [
        candidate.model_copy(
            update={
                "layers": candidate.layers[:1],
                "series": [
                    series.model_copy(update={"visits": [_cut(visit) for visit in series.visits]})
                    for series in candidate.series[:2]
                ],
            }
        )
        for candidate in run.candidates[0:3:2]
    ]
    return run.model_copy(
        update={"candidates": candidates, "workload": run.workload.model_copy(update={"points": points})}
    )


def _cut(visit: Visit) -> Visit:
    return visit.model_copy(update={"requests": [r.model_copy(update={"itl_s": r.itl_s[:3]}) for r in visit.requests]})
