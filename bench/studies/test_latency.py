"""Latency benchmarks for pytest-benchmark: `pytest bench --benchmark-only [--benchmark-json FILE]`.

The tests named `beside_dense` time torch's dense layer before each of their own calls and keep it as
`extra_info["control_s"]`: `crepe-deploy gate` compares their ratios, which survive another machine. The others are
absolute, for one machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crepe_deploy.bench.gate.interleave import Work, repeated
from crepe_deploy.bench.studies.workloads import decode_step, dense_linear, packed_linear

from crepe_deploy.model.stats import Stats
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.methods import get_method
from crepe_deploy.select import select

ROUNDS = 100
CALLS = 2  # shorter than a scheduler's time slice, so that some calls are undisturbed

Benchmark = Any  # pytest_benchmark.fixture.BenchmarkFixture, which is not typed


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """One thread, so that the machine's other cores may be busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def beside(benchmark: Benchmark, work: Work, control: Work) -> None:
    """Time `work`, and before each of its calls `control`."""
    times: list[float] = []

    def time_control() -> None:
        start = time.perf_counter()
        control()
        times.append(time.perf_counter() - start)

    control()
    benchmark.pedantic(work, setup=time_control, rounds=ROUNDS, warmup_rounds=5)
    benchmark.extra_info["control_s"] = times[-ROUNDS:]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("choice", "batch"), [("stream", 1), ("stream", 16), ("tile", 16)])
def test_packed_beside_dense(benchmark: Benchmark, choice: str, batch: int, dtype: str) -> None:
    """A packed layer, with torch's dense one before each call."""
    packed = packed_linear(batch, choice, dtype=getattr(torch, dtype))
    beside(benchmark, repeated(packed, CALLS), repeated(dense_linear(batch, dtype=getattr(torch, dtype)), CALLS))


@pytest.mark.parametrize("batch", [1, 16])
def test_dense(benchmark: Benchmark, batch: int) -> None:
    """torch's dense layer alone."""
    benchmark(repeated(dense_linear(batch), CALLS))


@pytest.mark.parametrize(("method", "params"), [("magnitude", {}), ("ria", {}), ("crepe", {"gamma": 1.0})])
def test_score_and_select(benchmark: Benchmark, method: str, params: dict[str, Any]) -> None:
    """Scoring a layer and choosing its mask."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=generator)
    norms = torch.rand(512, generator=generator) + 0.1
    scorer: Callable[..., torch.Tensor] = get_method(method, **params).score  # type: ignore[union-attr]
    benchmark(lambda: select(scorer(weight, Stats(col_norm=norms)), NM(2, 4)))


def test_decode_step(benchmark: Benchmark) -> None:
    """One token of a tiny model."""
    benchmark(decode_step())
