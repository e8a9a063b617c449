"""Measure the packed kernels against dense ones: `python -m crepe_deploy.bench.studies.kernels --out FILE.json`.

For each shape and batch, variants run one after the other, round after round, in one process:

    torch      torch's dense F.linear
    control    our own dense loop over the same layout (batch 1 to 4): what the layout gains without sparsity
    2:4 ...    the packed weight of each pattern, by the kernel that the dispatcher chooses

Weights are cycled through copies of at least 512 MB in all, so that none is still in a cache. Times are medians over
rounds; a ratio above 1 means packed is faster. Speed does not depend on values, so weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ...packed import dispatch, ops
from ...packed.format import pack
from ...packed.prepare import Prepared, prepare
from ...store.files import write_text

SHAPES: Final[dict[str, dict[str, tuple[int, int]]]] = {
    "Llama-3.1-8B": {
        "o": (4096, 4096),
        "k": (1024, 4096),
        "up": (14336, 4096),
        "down": (4096, 14336),
        "qkv fused": (6144, 4096),
        "gate_up fused": (28672, 4096),
    },
    "Qwen2.5-7B": {"o": (3584, 3584), "up": (18944, 3584), "down": (3584, 18944), "qkv fused": (4608, 3584)},
}
PATTERNS: Final = {"2:4": 4, "8:16": 16, "16:32": 32, "row 50%": 0}
BATCHES: Final = (1, 2, 4, 8, 16, 32, 64, 512)
CYCLED_BYTES: Final = 512 << 20
CONTROL_CHOICE: Final = 5
DRAWN_ROWS: Final = 64
MANY_TOKENS: Final = 256  # from here on calls are long, and a third of the rounds will do
CONTROL_BATCHES: Final = 4
DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Variant = Callable[[Tensor, int], object]


def main(arguments: list[str] | None = None) -> int:
    """Run the measurement and print its table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crepe_deploy.bench.studies.kernels", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--shapes", help="only these, as OUTxIN,OUTxIN")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--choice", choices=list(dispatch.CHOICES), help="force one kernel instead of the dispatcher's")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    wanted = {tuple(map(int, text.split("x"))) for text in options.shapes.split(",")} if options.shapes else None
    batches = [int(text) for text in options.batches.split(",")]
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    for model, shapes in SHAPES.items():
        for layer, shape in shapes.items():
            if wanted is None or shape in wanted:
                for row in measure_shape(shape, batches, options):
                    rows.append({"model": model, "layer": layer, "out": shape[0], "in": shape[1], **row})
                    print_row(rows[-1])
    if options.out:
        report = {
            "environment": environment(),
            "conditions": conditions(options, [load, os.getloadavg()[0]]),
            "rows": rows,
        }
        write_text(options.out, as_text(report))
    return 0


@torch.inference_mode()
def measure_shape(shape: tuple[int, int], batches: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a batch: median ms of each variant and the ratios; `shape` is (out, in)."""
    dtype = DTYPES[options.dtype]
    weight = torch.randn(shape).to(dtype)
    copies = -(-CYCLED_BYTES // (weight.numel() * weight.element_size()))
    dense = [weight.clone() for _ in range(copies)]

    def prepared(group: int) -> list[Prepared]:
        pair = random_packed(shape, group, dtype)
        return [prepare(*pair) for _ in range(copies)]

    packed = {name: prepared(PATTERNS[name]) for name in options.patterns.split(",")}
    control = prepared(1)
    rows = []
    for batch in batches:
        x = torch.randn(batch, shape[1]).to(dtype)
        plans = {name: plan_of(weights[0], batch, options.choice) for name, weights in packed.items()}
        variants: dict[str, Variant] = {"torch": lambda x, i: torch.nn.functional.linear(x, dense[i])}
        if batch <= CONTROL_BATCHES and has_control(dtype):
            variants["control"] = packed_variant(
                control, torch.full((dispatch.BUCKETS,), CONTROL_CHOICE, dtype=torch.int8)
            )
        for name, weights in packed.items():
            variants[name] = packed_variant(weights, plans[name])
        times = interleaved(variants, x, copies, options.rounds if batch < MANY_TOKENS else max(options.rounds // 3, 7))
        medians = {name: statistics.median(values) for name, values in times.items()}
        best = {name: min(values) for name, values in times.items()}
        rows.append(
            {
                "batch": batch,
                "kernel": {name: dispatch.NAMES[int(plan[dispatch.bucket(batch)])] for name, plan in plans.items()},
                "median_ms": rounded(medians),
                "best_ms": rounded(best),
                "against_torch": rounded({name: medians["torch"] / medians[name] for name in packed}),
                "best_against_torch": rounded({name: best["torch"] / best[name] for name in packed}),
                "best_against_control": rounded(
                    {name: best["control"] / best[name] for name in packed if "control" in best}
                ),
                "against_control": rounded(
                    {name: medians["control"] / medians[name] for name in packed if "control" in medians}
                ),
            }
        )
    return rows


def has_control(dtype: torch.dtype) -> bool:
    """Whether these kernels have a dense control: where they multiply stored values without converting them first."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and dispatch.describe()["isa"] in ("amx", "avx512bf16"))


def interleaved(variants: dict[str, Variant], x: Tensor, copies: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round, after two rounds of warm-up; every call takes the next copy."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 2):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant(x, turn % copies)
            elapsed = 1e3 * (time.perf_counter() - start)
            if turn >= 2:
                times[name].append(elapsed)
    return times


def random_packed(shape: tuple[int, int], group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A stored pair of `shape` (out, in) with a random half kept in each group of columns (0: the whole row, 1: all).

    Only some rows are drawn and then repeated: speed does not depend on values.
    """
    rows, columns = shape
    scores = torch.rand(DRAWN_ROWS, columns // (group or columns), group or columns)
    half = max(scores.shape[-1] // 2, 1)
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(2, scores.topk(half, sorted=False).indices, True)
    values, mask_bytes = pack(torch.randn(DRAWN_ROWS, columns).to(dtype), mask.view(DRAWN_ROWS, columns))
    return values.repeat(rows // DRAWN_ROWS, 1), mask_bytes.repeat(rows // DRAWN_ROWS, 1)


def plan_of(weight: Prepared, batch: int, choice: str | None) -> Tensor:
    """The dispatcher's plan with this batch's bucket measured, or one that always takes `choice`."""
    if choice:
        return torch.full((dispatch.BUCKETS,), dispatch.CHOICES[choice], dtype=torch.int8)
    plan = dispatch.plan_for(weight)
    dispatch.tune(weight, plan, (batch,))
    return plan


def packed_variant(weights: list[Prepared], plan: Tensor) -> Variant:
    """A variant that multiplies by copy `i` of a packed weight."""
    return lambda x, i: ops.nm_linear(x, weights[i], plan)


def as_text(report: dict[str, Any]) -> str:
    """The report as JSON, one line a row."""
    head = json.dumps({name: value for name, value in report.items() if name != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in report["rows"])
    return f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n ]\n}}\n'


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Four decimals are more than the measurements are worth."""
    return {name: round(value, 4) for name, value in values.items()}


def print_row(row: dict[str, Any]) -> None:
    """One line of the table: shape, batch, torch ms, then each pattern's ms, ratios and kernel."""
    cells = [f"{row['out']:>5}x{row['in']:<5} batch {row['batch']:>3}  torch {row['median_ms']['torch']:8.3f}"]
    if "control" in row["median_ms"]:
        cells.append(f"control {row['median_ms']['control']:7.3f}")
    for name, ratio in row["against_torch"].items():
        own = f"/{row['against_control'][name]:.2f}" if name in row["against_control"] else ""
        best = f"best {row['best_against_torch'][name]:.2f}"
        cells.append(f"{name} {row['median_ms'][name]:7.3f} {ratio:.2f}{own} {best} {row['kernel'][name]}")
    print("  ".join(cells), flush=True)


def environment() -> dict[str, Any]:
    """What the numbers belong to."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "flags": sorted(torch.backends.cpu.get_cpu_capability().split()),
        **{name: value for name, value in dispatch.describe().items() if name not in ("library", "measurements")},
    }


def conditions(options: argparse.Namespace, load: list[float]) -> dict[str, Any]:
    """How the numbers were taken."""
    return {
        "dtype": options.dtype,
        "rounds": options.rounds,
        "threads": options.threads,
        "cycled_mb": CYCLED_BYTES >> 20,
        "statistic": "median over interleaved rounds; best: the least, which other work on the machine disturbs less",
        "load_average_before_and_after": load,
        "choice": options.choice or "dispatcher",
    }


if __name__ == "__main__":
    sys.exit(main())
