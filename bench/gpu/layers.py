"""One layer shape: correctness against fp64 and times over the best dense baseline, for every batch and pattern."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...packed.cuda import dispatch, launch
from ...packed.cuda.dispatch import Held
from ...packed.cuda.layout import dense_control
from ...packed.cuda.linear import CudaLinear
from .timing import Call, interleaved
from .work import PATTERNS, Plan, random_packed

_ROUNDING = 2.0**-7  # of one bf16 result; the interpreter cuts where devices round
_SUMS = 1e-4  # of the largest product sum: what fp32 sums in another order may differ by


@torch.inference_mode()
def measure_shape(shape: tuple[int, int], batches: tuple[int, ...], plan: Plan, peak: float) -> list[dict[str, Any]]:
    """One row a batch and pattern. `peak` is the measured copy bandwidth in bytes per second."""
    rows = []
    for pattern, group in PATTERNS.items():
        layer = CudaLinear(*random_packed(shape, group, plan.device), plan.device, f"{pattern} {shape}")
        dense = layer.to_dense()
        control = Held(dense_control(dense), launch.counters_for(shape[0], plan.device))
        for batch in batches:
            x = torch.randn(batch, shape[1], device=plan.device).bfloat16()
            rows.append({"pattern": pattern, "batch": batch, **measure_batch(x, layer, dense, control, plan, peak)})
        del layer, dense, control
    return rows


def measure_batch(
    x: Tensor, layer: CudaLinear, dense: Tensor, control: Held, plan: Plan, peak: float
) -> dict[str, Any]:
    """Choice, correctness, times and ratios for one batch."""
    tokens = x.shape[0]
    held = layer.held()
    dispatch.tune(held, (tokens,))
    choice = dispatch.choice_for(held, tokens)
    own_dense = tokens <= launch.MOST_STREAMED
    if own_dense:
        dispatch.tune(control, (tokens,))
    checked = correctness(dispatch.run(choice, x, held, None), x, dense)
    copies = max(1, -(-plan.cold_bytes // held.weight.resident_bytes))
    packed = [copy_of(held) for _ in range(copies)]
    denses = [dense.clone() for _ in range(max(1, copies * held.weight.resident_bytes // (2 * dense.numel()) + 1))]
    variants: dict[str, list[Call]] = {
        "packed": [lambda one=one: dispatch.run(choice, x, one, None) for one in packed],  # type: ignore[misc]
        "cublas": [lambda one=one: torch.nn.functional.linear(x, one) for one in denses],  # type: ignore[misc]
    }
    if own_dense:
        streamed = dispatch.choice_for(control, tokens)
        controls = [Held(dense_control(one), control.counters) for one in denses]
        variants["own dense"] = [lambda one=one: dispatch.run(streamed, x, one, None) for one in controls]  # type: ignore[misc]
    times = interleaved(variants, plan)
    best_dense = min(times[name]["median"] for name in times if name != "packed")
    rate = held.weight.resident_bytes / (1e-6 * times["packed"]["median"])
    return {
        "choice": choice,
        **checked,
        "us": times,
        "over_dense": best_dense / times["packed"]["median"],
        "gb_per_s": rate / 1e9,
        "of_copy_bandwidth": rate / peak,
        "without_tensor24": layer.no_tensor24,
    }


def copy_of(held: Held) -> Held:
    """The same weight at another address."""
    weight = held.weight
    fields = {"values": weight.values.clone(), "meta": weight.meta.clone(), "offsets": weight.offsets.clone()}
    other = type(weight)(**{**vars(weight), **fields})
    tensor24 = None if held.tensor24 is None else held.tensor24.clone()
    return Held(other, torch.zeros_like(held.counters), tensor24)


def correctness(got: Tensor, x: Tensor, dense: Tensor) -> dict[str, Any]:
    """The largest error against fp64, in units of what rounding allows; `correct` when that is at most 1."""
    expected = x.double() @ dense.double().T
    room = _ROUNDING * expected.abs() + _SUMS * expected.abs().amax()
    worst = float(((got.double() - expected).abs() / room).amax())
    return {"correct": bool(worst <= 1), "error_over_allowed": worst}
