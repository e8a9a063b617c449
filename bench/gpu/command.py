"""The command line: stages that resume where the last run stopped, JSON as it goes, the table at the end.

    --stage machine     device, versions, copy bandwidth, dense product rate (run first; the others need it)
    --stage layers      every shape: correctness against fp64, and packed over the best dense baseline
    --stage model       a random Llama-3.1-8B: decode and prefill, dense and packed
    --stage prune       two blocks of that width pruned on the device and on the CPU: masks, seconds, peak memory

Without --stage all of them in order. What OUT holds already is not measured again; --minutes ends a run before a unit
of work that would begin later than that, with exit code 75: run the same command again to go on.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...errors import EXIT_RESUMABLE, ConfigError, CrepeError
from ...packed.cuda import dispatch
from ...store.files import write_json
from .layers import measure_shape
from .model import measure_model
from .pruning import measure_pruning
from .table import render, write_into
from .timing import copy_bandwidth, product_rate
from .work import REAL, REHEARSAL, Plan

STAGES = ("machine", "layers", "model", "prune")
Unit = tuple[str, str, Callable[[], Any]]


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing; returns the exit code: 0 done, 1 wrong results, 2 usage, 75 stopped and resumable."""
    parser = argparse.ArgumentParser(
        prog="python bench/gpu/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu.json"))
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing later than this (default 9)")
    parser.add_argument("--table", type=Path, help="write the table into this page, between its markers")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU; the numbers mean nothing")
    options = parser.parse_args(arguments)
    try:
        return measure(options)
    except CrepeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def measure(options: argparse.Namespace) -> int:
    """Run the stages asked for and write what they find. Raises ConfigError when this machine cannot."""
    plan = REHEARSAL if options.rehearse else REAL
    if plan.on_gpu and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here; --rehearse runs everything on the CPU at tiny sizes")
    results = load(options.out, options.rehearse)
    began = time.monotonic()
    for stage, name, unit in units(plan, results, tuple(options.stage or STAGES)):
        if name in results[stage]:
            continue
        if time.monotonic() - began > 60 * options.minutes:
            print(f"stopped before {stage} {name}; the same command goes on from here", file=sys.stderr)
            return EXIT_RESUMABLE
        start = time.monotonic()
        results[stage][name] = unit()
        write_json(options.out, results)
        free()
        print(f"{stage} {name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
    wrong = [row for rows in results["layers"].values() for row in rows if not row["correct"]]
    differing = [name for name, row in results["prune"].items() if not row["correct"]]
    text = render(results)
    print(text)
    if options.table:
        write_into(options.table, text)
    if wrong:
        print(f"error: {len(wrong)} results differ from fp64 by more than rounding", file=sys.stderr)
    if differing:
        print(f"error: the device chose other masks of equal scores: {', '.join(differing)}", file=sys.stderr)
    return 1 if wrong or differing else 0


def units(plan: Plan, results: dict[str, Any], stages: tuple[str, ...]) -> Iterator[Unit]:
    """Every piece of work in order: stage, name, and what to call. Raises ConfigError without the machine's figures."""
    if "machine" in stages:
        yield "machine", "device", lambda: machine(plan)
    if "device" not in results["machine"]:
        raise ConfigError("the copy bandwidth is not in the results yet: run --stage machine first")
    peak = float(results["machine"]["device"]["copy_bytes_per_s"])
    if results["machine"]["device"]["valid_for"] != dispatch.machine():
        raise ConfigError("the results are another device's, or other versions': name another --out")
    if "layers" in stages:
        for model, shapes in plan.shapes.items():
            for layer, shape in shapes.items():
                for batch in plan.batches:
                    yield (
                        "layers",
                        f"{model}/{layer}/{shape[0]}x{shape[1]}/{batch}",
                        functools.partial(measure_shape, shape, (batch,), plan, peak),
                    )
    if "model" in stages:
        for variant in plan.variants:
            yield "model", variant, functools.partial(measure_model, variant, plan)
    if "prune" in stages:
        for what in plan.prunings:
            yield "prune", what, functools.partial(measure_pruning, what, plan)


def machine(plan: Plan) -> dict[str, Any]:
    """What the numbers belong to."""
    return {
        "valid_for": dispatch.machine(),
        "capability": list(torch.cuda.get_device_capability()) if plan.on_gpu else None,
        "copy_bytes_per_s": copy_bandwidth(plan),
        "bf16_product_flop_per_s": product_rate(plan),
        "command": "python bench/gpu/run.py" + ("" if plan.on_gpu else " --rehearse"),
    }


def load(path: Path, rehearsal: bool) -> dict[str, Any]:
    """The results so far. Raises ConfigError for a file that is damaged or of the other kind."""
    if not path.exists():
        return {"version": 1, "rehearsal": rehearsal, **{stage: {} for stage in STAGES}}
    try:
        results: dict[str, Any] = json.loads(path.read_text())
        fits = results["version"] == 1 and results["rehearsal"] == rehearsal and all(s in results for s in STAGES[:3])
        results.setdefault("prune", {})  # what was measured before there was this stage
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a file of GPU results: {error}") from error
    if not fits:
        raise ConfigError(f"{path} holds results of another kind; name another --out")
    return results


def free() -> None:
    """Give the device its memory back between units."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
