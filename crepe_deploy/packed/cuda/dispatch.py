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
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from .. import measurements
from ..dispatch import TUNE_VARIABLE
from ..dispatch import bucket as _bucket
from ..measurements import Timer, Times
from . import launch, semi_structured
from .layout import DeviceWeight

BUCKETS: Final = 13
USUAL_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 256, 2048)
_ORDER: Final = ("stream", "tensor24", "expand", "dense")  # what allocates least comes first
_TIE: Final = 1.03
_DENSE_GAIN: Final = 0.97  # a dense copy is worth its memory below this fraction of the best packed time
_STREAM_MOST: Final = 2048
_SPLITS: Final = (2, 4, 8)
_FLUSH_BYTES: Final = 256 << 20
_TURNS: Final = 9


@dataclass(frozen=True)
class Held:
    """All a call may use of one layer: its weight, counters, cuSPARSELt's tensor and a dense copy, where there are."""

    weight: DeviceWeight
    counters: Tensor
    tensor24: Tensor | None = None
    dense: Tensor | None = None


def bucket(tokens: int) -> int:
    """The bucket of a batch: 0 for 1, 1 for 2, 2 for 3-4, ... 12 for all above 2048."""
    return _bucket(tokens, BUCKETS)


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
    source = Path(__file__).with_name("kernels.py").read_bytes() + Path(__file__).with_name("launch.py").read_bytes()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": _version("triton"),
        "cusparselt": str(sparse.version()) if on_gpu and sparse.is_available() else "none",
        "kernels": hashlib.sha256(source).hexdigest()[:16],
    }


@functools.cache
def measured() -> dict[str, Times]:
    """All measurements of this device known to this process, by key; read from disk once."""
    return measurements.read(cache_path(), machine(), known)


def cache_path() -> Path:
    """The file of this device's measurements."""
    return measurements.path_of(machine())


def forget() -> Path:
    """Drop all measurements of this device; returns their file."""
    path = cache_path()
    path.unlink(missing_ok=True)
    measured.cache_clear()
    return path


def known(choice: str) -> bool:
    """Whether this is the name of a choice."""
    try:
        kind, _, rest = choice.partition(" ")
        if kind == "stream":
            launch.Config.parse(rest)
        elif kind == "tensor24":
            _algorithm(rest)
        else:
            return choice in ("expand", "dense")
    except ValueError:
        return False
    return True


def choice_for(held: Held, tokens: int) -> str:
    """The measured choice for a batch of `tokens`; where nothing was measured, a rule of thumb."""
    times = measured().get(key(held.weight, bucket(tokens)))
    if times:
        usable = {name: ms for name, ms in times.items() if _usable(name, held, tokens)}
        if set(usable) - {"dense"}:
            return fastest(usable, held.dense is not None)
    if tokens <= launch.MOST_STREAMED:
        return f"stream {launch.usual(held.weight, tokens, launch.processors(held.counters.device))}"
    if held.dense is not None:
        return "dense"
    return "tensor24 a0 s1" if held.tensor24 is not None else "expand"


def fastest(times: Times, keep_dense: bool = False) -> str:
    """The fastest choice; among near-equals the kind that allocates least; `dense` only if kept and clearly best."""
    packed = {name: ms for name, ms in times.items() if name != "dense"}
    if "expand" in packed:  # it contains the dense product: measured below that, it is noise
        packed["expand"] = max(packed["expand"], times.get("dense", 0.0))
    best = min(packed, key=lambda name: packed[name])
    if keep_dense and times.get("dense", packed[best]) < _DENSE_GAIN * packed[best]:
        return "dense"
    near = [name for name, ms in packed.items() if ms <= _TIE * packed[best]]
    return min(near, key=lambda name: (_ORDER.index(name.partition(" ")[0]), packed[name]))


def run(choice: str, x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
    """Compute `x W^T + bias` by one choice; x `(tokens, columns)`. Raises KernelError for tensors that do not fit."""
    kind, _, rest = choice.partition(" ")
    if kind == "stream":
        return launch.linear(x, held.weight, held.counters, bias, launch.Config.parse(rest))
    if kind == "tensor24" and held.tensor24 is not None:
        return semi_structured.linear(x, held.tensor24, bias, *_algorithm(rest))
    dense = held.dense if kind == "dense" and held.dense is not None else launch.expand(held.weight)
    return torch.nn.functional.linear(x, dense, bias)


def tuning_enabled(device: torch.device) -> bool:
    """Whether measuring is allowed here and now: on a CUDA device, outside a graph's capture, unless turned off."""
    if os.environ.get(TUNE_VARIABLE, "1") == "0" or device.type != "cuda":
        return False
    return not torch.cuda.is_current_stream_capturing()


def tune(held: Held, tokens: tuple[int, ...], timer: Timer | None = None, keep_dense: bool = False) -> bool:
    """Measure what is not known for these batch sizes and remember it; returns whether a dense copy would pay.

    Seconds for each new bucket, kernels compiled included, with a dense copy held meanwhile. Without a `timer` it
    does nothing where measuring is not allowed.
    """
    if timer is None and not tuning_enabled(held.counters.device):
        return False
    wants_dense = False
    new: dict[str, Times] = {}
    for index in sorted({bucket(count) for count in tokens}):
        name = key(held.weight, index)
        times = measured().get(name)
        if times is None:
            times = new[name] = measure(held, 1 << index, timer or event_times)
        wants_dense |= fastest(times, keep_dense) == "dense"
    if new:
        measured().update(new)
        measurements.add(cache_path(), machine(), known, new)
    return wants_dense


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
        algorithm, _ = _algorithm(min(sparse, key=lambda name: seconds[name]).partition(" ")[2])
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
    found = []
    for name, times in sorted(measured().items()):
        dtype, kind, shape, index = name.split("/")
        choice = fastest(times)
        found.append(
            {
                "dtype": dtype,
                "kind": kind,
                "shape": [int(size) for size in shape.split("x")],
                "batch": 1 << int(index.removeprefix("bucket")),
                "choice": choice,
                "gain_over_dense": times["dense"] / times[choice] if "dense" in times else None,
            }
        )
    return found


def _usable(choice: str, held: Held, tokens: int) -> bool:
    """Whether a layer without every copy can run this measured choice for so many tokens."""
    kind, _, rest = choice.partition(" ")
    if kind == "stream":
        config = launch.Config.parse(rest)
        return config.tokens > launch.MOST_STREAMED or config.tokens >= tokens
    return {"tensor24": held.tensor24, "dense": held.dense}.get(kind, held.weight) is not None


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


def _algorithm(text: str) -> tuple[int, int]:
    """`aN sN` as numbers. Raises ValueError for anything else."""
    algorithm, split = text.split(" ")
    if algorithm[:1] != "a" or split[:1] != "s":
        raise ValueError(f"'{text}' is no algorithm")
    return int(algorithm[1:]), int(split[1:])


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"
