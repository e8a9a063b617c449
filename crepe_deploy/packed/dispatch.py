"""Which kernel serves which batch: measured once per machine, shape and bucket, and kept in the user's cache.

Choices: `stream` expands packed weights in registers, `tile` expands a tile that serves the whole batch, `expand`
makes a dense scratch copy for one call, `dense` uses a dense copy the layer keeps (only with keep_dense="auto").
Batch sizes share a bucket up to the next power of two, all above 256 the last. A plan is an int8 tensor (10), one
choice a bucket; 0 means not measured: the kernels' own rule of thumb then decides. `CREPE_DEPLOY_TUNE=0` leaves every
plan at 0, so that runs are reproducible bit by bit. "Never slower than dense" is a policy: without a dense copy a
layer falls back to `expand`, which costs one expansion a call; where even that loses to dense, the recorded times
say so (`describe_plan`), and `keep_dense="auto"` buys the loss back with memory. `cuda.dispatch` is the same for GPUs.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from . import ops
from .native import TORCH_ISA, backend
from .prepare import PAD, Prepared
from .tuning.measurements import Timer, Times
from .tuning.tuner import Tuner, bucket_of, tuning_allowed

BUCKETS: Final = 10
CHOICES: Final[dict[str, int]] = {"auto": 0, "stream": 1, "tile": 2, "expand": 3, "dense": 4}
NAMES: Final = {code: name for name, code in CHOICES.items()}
USUAL_TOKENS: Final = (1, 4, 16, 64, 512)

_ORDER: Final = ("stream", "tile", "expand", "dense")  # what allocates least comes first
_STREAM_TOKENS: Final = 16  # registers are not worth trying beyond this batch
_TURNS: Final = (3, 12)  # least and most runs of each choice
_AGREE: Final = 1.03  # a best time counts as seen twice when another is within this


def bucket(tokens: int) -> int:
    """The bucket of a batch: 0 for 1, 1 for 2, 2 for 3-4, ... 9 for all above 256."""
    return bucket_of(tokens, BUCKETS)


def tuning_enabled() -> bool:
    """Whether measuring is allowed: not without native kernels, not with `CREPE_DEPLOY_TUNE=0`."""
    return tuning_allowed() and backend().isa != TORCH_ISA


def plan_for(weight: Prepared) -> Tensor:
    """A new plan, int8 (10): what the cache knows about this shape here, 0 elsewhere."""
    plan = torch.zeros(BUCKETS, dtype=torch.int8)
    if tuning_enabled():
        for index in range(BUCKETS):
            times = TUNER.measured.get(key(weight, index))
            if times:
                plan[index] = CHOICES[TUNER.fastest(times)]
    return plan


def ensure_tuned(weight: Prepared, plan: Tensor, x: Tensor) -> None:
    """Measure the bucket of `x` `(..., in)` if the plan does not know it; changes `plan` in place."""
    tokens = x.numel() // max(x.shape[-1], 1)
    if tokens and not plan[bucket(tokens)].item() and tuning_enabled():
        tune(weight, plan, (tokens,))


def tune(
    weight: Prepared, plan: Tensor, tokens: tuple[int, ...], keep_dense: bool = False, timer: Timer | None = None
) -> bool:
    """Fill the plan's buckets of these batch sizes, in place; returns whether they want a dense copy kept.

    Measures what the cache does not know (tens of milliseconds a bucket, with a dense copy held meanwhile) and adds it
    to the cache. Without native kernels or with `CREPE_DEPLOY_TUNE=0` it changes nothing.
    """
    if not tuning_enabled():
        return False
    timer = timer or best_times
    keys = {index: key(weight, index) for index in sorted({bucket(count) for count in tokens})}
    times = TUNER.times({name: functools.partial(measure, weight, 1 << index, timer) for index, name in keys.items()})
    chosen = {index: TUNER.fastest(times[name], keep_dense) for index, name in keys.items()}
    for index, choice in chosen.items():
        plan[index] = CHOICES[choice]
    return "dense" in chosen.values()


def measure(weight: Prepared, tokens: int, timer: Timer) -> Times:
    """Milliseconds of each choice for a batch of `tokens`, `dense` among them for comparison."""
    x = torch.randn(tokens, weight.in_features, generator=torch.Generator().manual_seed(0)).to(weight.values.dtype)
    dense = ops.nm_expand(weight)
    names = ["tile", "expand", "dense"]
    if tokens <= _STREAM_TOKENS:
        names.insert(0, "stream")
    runs: dict[str, Callable[[], object]] = {}
    for name in names:
        plan = torch.full((BUCKETS,), CHOICES[name], dtype=torch.int8)
        runs[name] = functools.partial(ops.nm_linear, x, weight, plan, None, dense)
    return {name: 1e3 * seconds for name, seconds in timer(runs).items()}


def best_times(runs: Mapping[str, Callable[[], object]]) -> Times:
    """Seconds of each run at its best. They take turns until every best was seen twice, or for so many turns: what
    other work on the machine disturbs is then neither one choice alone nor, unless it lasts, any best."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    least, most = _TURNS
    for turn in range(most):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
        if turn + 1 >= least and all(_seen_twice(seconds) for seconds in times.values()):
            break
    return {name: min(seconds) for name, seconds in times.items()}


def _seen_twice(seconds: list[float]) -> bool:
    best, second = sorted(seconds)[:2]
    return second <= _AGREE * best


def key(weight: Prepared, index: int) -> str:
    """What a measurement depends on besides the machine; any two patterns that keep as many entries share it."""
    values, _, _, rows, columns = weight
    kept = (values.numel() - PAD) / max(rows * columns, 1)
    dtype = str(values.dtype).removeprefix("torch.")
    return f"{backend().isa}/{dtype}/{rows}x{columns}/kept{kept:.3f}/threads{torch.get_num_threads()}/bucket{index}"


@functools.cache
def machine() -> dict[str, str]:
    """What a measurement is valid for: processor, torch, and the kernels' build."""
    native = backend().native
    return {
        "cpu": _cpu_name(),
        "torch": torch.__version__,
        "kernels": native.path.parent.name if native else TORCH_ISA,
    }


TUNER: Final = Tuner(machine, set(_ORDER).__contains__, _ORDER, tie=1.08, dense_gain=0.95)


def describe_plan(weight: Prepared, plan: Tensor) -> dict[str, dict[str, Any]]:
    """For each bucket, by its largest batch: the choice, and measured times in ms with the gain over dense."""
    report: dict[str, dict[str, Any]] = {}
    for index, code in enumerate(plan.tolist()):
        times = TUNER.measured.get(key(weight, index), {})
        entry: dict[str, Any] = {"choice": NAMES[code], "times_ms": times}
        if times and "dense" in times:
            entry["gain_over_dense"] = times["dense"] / times.get(NAMES[code], times["dense"])
        report[str(1 << index) if index < BUCKETS - 1 else f"above {1 << (index - 1)}"] = entry
    return report


def choices() -> list[dict[str, Any]]:
    """Every measured shape and batch on this machine: the choice, and how many times as fast as dense it is."""
    return [
        {
            "isa": isa,
            "dtype": dtype,
            "shape": [int(size) for size in shape.split("x")],
            "kept": float(kept.removeprefix("kept")),
            "threads": int(threads.removeprefix("threads")),
            **entry,
        }
        for (isa, dtype, shape, kept, threads), entry in TUNER.entries()
    ]


def describe() -> dict[str, Any]:
    """What serves packed linears on this machine and why: for `doctor` and reports."""
    served = backend()
    native = served.native
    return {
        "isa": served.isa,
        "reason": served.reason,
        "supported": [*(native.supported if native else ()), TORCH_ISA],
        "compiler": native.compiler if native else None,
        "library": str(native.path) if native else None,
        "threads": torch.get_num_threads(),
        "tuning": tuning_enabled(),
        "measurements": str(TUNER.path()),
        "machine": machine(),
    }


def _cpu_name() -> str:
    """The processor's name with its model and stepping, which tell generations apart that share a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    details = [f"{key} {fields[key]}" for key in ("model", "stepping") if key in fields]
    return f"{name} ({', '.join(details)})" if details else name
