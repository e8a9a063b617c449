"""Which kernel serves which batch on a GPU: measured once per device and library versions, kept in the user's cache.

Choices: `stream CONFIG` multiplies by the packed weight with the decode kernel, `tensor24 aN sN` with cuSPARSELt's
algorithm N and split-k (2:4), `expand` makes a dense scratch copy for one call, `dense` uses a copy the layer keeps.
Batch sizes share a bucket up to the next power of two, all above 2048 the last. Algorithm ids mean nothing to another
version of cuSPARSELt: versions are part of what a measurement is valid for. As on the CPU, `CREPE_DEPLOY_TUNE=0`
measures nothing, and without a dense copy the fastest packed choice is taken even where dense would be faster; the
recorded times then say so (`describe`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..tuning.measurements import Timer, Times
from ..tuning.tuner import Tuner, bucket_of, tuning_allowed
from . import launch, semi_structured
from .layout import DeviceWeight

BUCKETS: Final = 13
USUAL_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
_ORDER: Final = ("stream", "tensor24", "expand", "dense")  # what allocates least comes first
_STREAM_MOST: Final = 2048
_SPLITS: Final = (2, 4, 8)
_FLUSH_BYTES: Final = 256 << 20
_TURNS: Final = 9
_KERNEL_SOURCES: Final = ("groups.py", "kernels.py", "launch.py", "products.py")  # what changes the speed of `stream`


@dataclass(frozen=True)
class Held:
    """All a call may use of one layer: its weight, counters, cuSPARSELt's tensor and a dense copy, where there are."""

    weight: DeviceWeight
    counters: Tensor
    tensor24: Tensor | None = None
    dense: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """A choice, parsed: its kind, the configuration of `stream`, the algorithm and split-k of `tensor24`."""

    kind: str
    config: launch.Config | None = None
    algorithm: int = 0
    split: int = 1


@functools.cache
def parse(name: str) -> Choice:
    """The choice of this name, read once for each. Raises ValueError where there is none."""
    kind, _, rest = name.partition(" ")
    if kind == "stream":
        return Choice(kind, launch.Config.parse(rest))
    if kind == "tensor24":
        algorithm, split = rest.split(" ")
        if algorithm[:1] != "a" or split[:1] != "s":
            raise ValueError(f"'{rest}' is no algorithm")
        return Choice(kind, None, int(algorithm[1:]), int(split[1:]))
    if name not in ("expand", "dense"):
        raise ValueError(f"'{name}' is no choice")
    return Choice(kind)


def known(name: str) -> bool:
    """Whether this is the name of a choice."""
    try:
        parse(name)
    except ValueError:
        return False
    return True


def bucket(tokens: int) -> int:
    """The bucket of a batch: 0 for 1, 1 for 2, 2 for 3-4, ... 12 for all above 2048."""
    return bucket_of(tokens, BUCKETS)


def key(weight: DeviceWeight, index: int) -> str:
    """What a measurement depends on besides the machine."""
    dtype = str(weight.values.dtype).removeprefix("torch.")
    kept = weight.kept if weight.kept else "-"
    return f"{dtype}/{weight.kind.name.lower()}{kept}/{weight.rows}x{weight.columns}/bucket{index}"


@functools.cache
def machine() -> dict[str, str]:
    """What a measurement is valid for: device, driver interface, libraries and the kernels' source."""
    on_gpu = torch.cuda.is_available()
    sparse = torch.backends.cusparselt
    source = b"".join(Path(__file__).with_name(name).read_bytes() for name in _KERNEL_SOURCES)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": _version("triton"),
        "cusparselt": str(sparse.version()) if on_gpu and sparse.is_available() else "none",
        "kernels": hashlib.sha256(source).hexdigest()[:16],
    }


TUNER: Final = Tuner(machine, known, _ORDER, tie=1.03, dense_gain=0.97)


def choice_for(held: Held, tokens: int) -> str:
    """The measured choice for a batch of `tokens`; where nothing was measured, a rule of thumb."""
    index = bucket(tokens)
    copies = held.tensor24 is not None, held.dense is not None
    usable = functools.partial(_usable, held, 1 << index)
    measured = TUNER.choice(key(held.weight, index), copies, usable, held.dense is not None)
    if measured is not None:
        return measured
    if tokens <= launch.MOST_STREAMED:
        return f"stream {launch.usual(held.weight, tokens, launch.processors(held.counters.device))}"
    if held.dense is not None:
        return "dense"
    return "tensor24 a0 s1" if held.tensor24 is not None else "expand"


def run(choice: str, x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
    """Compute `x W^T + bias` by one choice; x `(tokens, columns)`. Raises KernelError for tensors that do not fit."""
    parsed = parse(choice)
    if parsed.config is not None:
        return launch.linear(x, held.weight, held.counters, bias, parsed.config)
    if parsed.kind == "tensor24" and held.tensor24 is not None:
        return semi_structured.linear(x, held.tensor24, bias, parsed.algorithm, parsed.split)
    dense = held.dense if parsed.kind == "dense" and held.dense is not None else launch.expand(held.weight)
    return torch.nn.functional.linear(x, dense, bias)


def tuning_enabled(device: torch.device) -> bool:
    """Whether measuring is allowed here and now: on a CUDA device, outside a graph's capture, unless turned off."""
    if not tuning_allowed() or device.type != "cuda":
        return False
    return not torch.cuda.is_current_stream_capturing()


def tune(held: Held, tokens: tuple[int, ...], timer: Timer | None = None, keep_dense: bool = False) -> bool:
    """Measure what is not known for these batch sizes and remember it; returns whether a dense copy would pay.

    Seconds for each new bucket, kernels compiled included, with a dense copy held meanwhile. Without a `timer` it
    does nothing where measuring is not allowed.
    """
    if timer is None and not tuning_enabled(held.counters.device):
        return False
    timer = timer or event_times
    keys = {key(held.weight, index): 1 << index for index in sorted({bucket(count) for count in tokens})}
    times = TUNER.times({name: functools.partial(measure, held, largest, timer) for name, largest in keys.items()})
    return any(TUNER.fastest(one, keep_dense) == "dense" for one in times.values())


def measure(held: Held, tokens: int, timer: Timer) -> Times:
    """Milliseconds of every choice for a batch of `tokens`, `dense` among them for comparison."""
    weight = held.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, weight.columns, generator=generator).to(weight.values.device, weight.values.dtype)
    full = Held(weight, held.counters, held.tensor24, launch.expand(weight) if held.dense is None else held.dense)
    runs = {name: functools.partial(run, name, x, full, None) for name in candidates(held, x)}
    seconds = timer(runs)
    sparse = [name for name in seconds if name.startswith("tensor24")]
    if sparse:
        algorithm = parse(min(sparse, key=lambda name: seconds[name])).algorithm
        names = [f"tensor24 a{algorithm} s{split}" for split in _SPLITS]
        more = {name: functools.partial(run, name, x, full, None) for name in names}
        seconds |= timer(_runnable(more))
    return {name: 1e3 * took for name, took in seconds.items()}


def candidates(held: Held, x: Tensor) -> list[str]:
    """Every choice worth measuring for the batch `x`."""
    tokens = x.shape[0]
    names: list[str] = []
    if tokens <= _STREAM_MOST:
        units = launch.processors(x.device)
        streams = [f"stream {config}" for config in launch.configs(held.weight, tokens, units)]
        names += _runnable({name: functools.partial(run, name, x, held, None) for name in streams})
    if held.tensor24 is not None:
        names += [f"tensor24 a{algorithm} s1" for algorithm in semi_structured.algorithms(held.tensor24, x)]
    return [*names, "expand", "dense"]


def event_times(runs: Mapping[str, Callable[[], object]]) -> Times:
    """Seconds of each run at its best by CUDA events, taking turns, each with the second-level cache emptied before.

    The emptying also keeps the device busy while a run is being queued, so that launches cost the device no time.
    """
    scratch = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(_TURNS + 1):
        for name, call in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            scratch.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn:
                best[name] = min(best[name], 1e-3 * start.elapsed_time(end))
    return best


def describe() -> list[dict[str, Any]]:
    """Every measured shape and batch on this device: the choice, and how many times as fast as dense it is."""
    return [
        {"dtype": dtype, "kind": kind, "shape": [int(size) for size in shape.split("x")], **entry}
        for (dtype, kind, shape), entry in TUNER.entries()
    ]


def _usable(held: Held, tokens: int, name: str) -> bool:
    """Whether a layer without every copy can run this measured choice for every batch of up to `tokens`."""
    choice = parse(name)
    if choice.config is not None:
        return choice.config.tokens > launch.MOST_STREAMED or choice.config.tokens >= tokens
    return {"tensor24": held.tensor24, "dense": held.dense}.get(choice.kind, held.weight) is not None


def _runnable(runs: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The runs that this device can do: too much shared memory or an unknown algorithm is not an error here."""
    able: dict[str, Callable[[], object]] = {}
    for name, call in runs.items():
        try:
            call()
        except RuntimeError as error:  # torch.AcceleratorError and out of memory are fatal, a refused launch is not
            if isinstance(error, torch.AcceleratorError):
                raise
            continue
        except launch.refused_launch():
            continue
        able[name] = call
    return able


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"
