"""Seconds of small work on a device: CUDA graphs over rotating copies, variants taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .work import Plan

Call = Callable[[], object]


def graph_of(calls: Sequence[Call], plan: Plan) -> Call:
    """One replayable run of these calls in order: a CUDA graph, or without a GPU the calls themselves."""
    if not plan.on_gpu:
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles and allocates outside the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def interleaved(variants: Mapping[str, Sequence[Call]], plan: Plan) -> dict[str, dict[str, float]]:
    """Microseconds of one call of each variant: the median and the least over rounds in which they take turns.

    Each variant is a sequence of calls on copies that together do not fit into a cache.
    """
    runs = {name: graph_of(calls, plan) for name, calls in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(plan.rounds + 1):
        for name, run in runs.items():
            took = seconds(run, plan) / len(variants[name])
            if turn or not plan.rounds:  # the first turn warms up
                times[name].append(1e6 * took)
    return {name: {"median": statistics.median(us), "best": min(us)} for name, us in times.items()}


def seconds(run: Call, plan: Plan) -> float:
    """Seconds of one run: by CUDA events, or the clock without a GPU."""
    if not plan.on_gpu:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return 1e-3 * float(begin.elapsed_time(end))


def copy_bandwidth(plan: Plan) -> float:
    """Bytes per second, read and written, of a device copy."""
    source = torch.empty(plan.copied_bytes, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    took = interleaved({"copy": [lambda: target.copy_(source)]}, plan)["copy"]["best"]
    return 2 * plan.copied_bytes / (1e-6 * took)


def product_rate(plan: Plan) -> float:
    """Floating-point operations per second of a dense bf16 product."""
    a = torch.randn(plan.square, plan.square, device=plan.device).bfloat16()
    took = interleaved({"product": [lambda: a @ a]}, plan)["product"]["best"]
    return 2 * plan.square**3 / (1e-6 * took)
