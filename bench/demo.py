"""The demo: prune a real model with every method, export, reload and compare, with the commands a user would type.

    python -m crepe_deploy.bench.demo [--out out/demo] [--json FILE]

Model: SmolLM2-135M-Instruct, dequantised Q4_1. Calibration: c4, 16 x 512 tokens. Test text: wiki test split.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import ServeError
from ..store.files import write_json, write_text
from .assets import DEFAULT_DIR, MODEL_NAME, ensure_assets
from .run.processes import crepe_deploy
from .run.result import load_run
from .run.summary import gain

RUNS = [
    ("magnitude", "2:4", "dense"),
    ("wanda", "2:4", "dense"),
    ("ria", "2:4", "dense"),
    ("sparsegpt", "2:4", "dense"),
    ("crepe", "2:4", "dense,packed"),
    ("crepe", "16:32", "dense,packed"),
]
SERVED = "crepe-16of32"
CALIBRATION = ("--calib-samples", "16", "--calib-length", "512", "--seed", "0")
EVALUATION = ("--window", "512", "--max-tokens", "8192")
DECODING = ("--points", "1x64+33", "--rounds", "5")  # batch 1, prompts of 64 tokens, 32 decode steps
PROMPT = "The capital of France is"


def measure(out: Path, assets_dir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Prune and evaluate every run of `RUNS`; returns rows and the conditions they were measured under."""
    assets = ensure_assets(assets_dir)
    calib, text = assets.text("c4", "train"), assets.text("wiki", "test")
    dense = crepe_deploy("eval", str(assets.model), "--text", str(text), *EVALUATION)
    rows = [{"method": "dense", "pattern": "-", "sparsity": 0.0, **_quality(dense.output), **_size(assets.model)}]
    for index, (method, pattern, formats) in enumerate(RUNS):
        say(f"[{index + 1}/{len(RUNS)}] {method} {pattern}")
        folder = out / _slug(method, pattern)
        pruned = crepe_deploy(
            "prune-and-export", str(assets.model), "--out", str(folder), "--method", method, "--sparsity", pattern,
            "--calib", str(calib), *CALIBRATION, "--format", formats,
        )  # fmt: skip
        quality = crepe_deploy(
            "eval", str(folder / "dense"), "--text", str(text), *EVALUATION, "--against", str(assets.model)
        )
        row = {"method": method, "pattern": pattern, "sparsity": pruned.output["sparsity_of_pruned_tensors"]}
        cost = {"seconds": pruned.seconds, "peak_bytes": pruned.peak_bytes}
        rows.append(row | _quality(quality.output) | cost | _size(folder / formats.split(",")[-1]))
    return {
        "model": MODEL_NAME,
        "calibration": "c4 train, " + " ".join(CALIBRATION),
        "evaluation": "wiki test, " + " ".join(EVALUATION),
        "dtype": dense.output["convention"]["dtype"],
        "cores": os.cpu_count(),
        "rows": rows,
    }


def add_decode_speed(result: dict[str, Any], out: Path, assets_dir: Path) -> None:
    """Measure the packed exports beside the dense model in vLLM; puts `decode_gain` into their rows."""
    dense = ensure_assets(assets_dir).model
    rows = [row for row in result["rows"] if row["format"] == "packed"]
    folders = [out / _slug(row["method"], row["pattern"]) / "packed" for row in rows]
    path = out / "decode.json"
    crepe_deploy("bench", str(dense), *map(str, folders), "--baseline", str(dense), *DECODING, "--out", str(path))
    run = load_run(path)
    by_folder = {Path(candidate.folder).resolve(): candidate for candidate in run.candidates}
    for row, folder in zip(rows, folders, strict=True):
        speed = gain(run, by_folder[folder.resolve()], run.workload.points[0].name, "tpot_s")
        row["decode_gain"] = speed and speed.model_dump()
    result["decoding"] = " ".join(DECODING) + f", {run.environment.threads} threads"


def _slug(method: str, pattern: str) -> str:
    return f"{method}-{pattern.replace(':', 'of')}"


def _quality(report: dict[str, Any]) -> dict[str, Any]:
    paired = report["paired"]
    return {"perplexity": report["perplexity"]["value"], "kl": paired and paired["kl_mean"]["value"]}


def _size(folder: Path) -> dict[str, Any]:
    files = list(folder.glob("*.safetensors"))
    return {
        "format": folder.name if folder.name == "packed" else "dense",
        "file_bytes": sum(f.stat().st_size for f in files),
    }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "method": lambda row: str(row["method"]),
    "pattern": lambda row: str(row["pattern"]),
    "zeros counted": lambda row: f"{row['sparsity']:.2%}",
    "PPL": lambda row: f"{row['perplexity']:.2f}",
    "KL to dense": lambda row: f"{row['kl']:.3f}" if row["kl"] is not None else "",
    "prune s": lambda row: f"{row['seconds']:.1f}" if "seconds" in row else "",
    "peak MB": lambda row: f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
    "file MB": lambda row: f"{row['file_bytes'] / 1e6:.0f} {row['format']}",
    "decode": lambda row: _decode_cell(row.get("decode_gain")),
}


def _decode_cell(gain: dict[str, Any] | None) -> str:
    return "" if gain is None else f"{gain['value']:.2f}x [{gain['low']:.2f}, {gain['high']:.2f}]"


def markdown(result: dict[str, Any]) -> str:
    """The rows as a Markdown table, conditions below."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    lines += ["| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |" for row in result["rows"]]
    conditions = (
        f"{result['model']}, {result['dtype']}, {result['cores']} cores. Calibration: {result['calibration']}. "
        f"Evaluation: {result['evaluation']}, windows without overlap. Seconds and peak resident memory are those of "
        "the whole `prune-and-export` process, imports, proof and hashing included, and for the crepe rows packing."
    )
    if "decoding" in result:
        conditions += (
            f" Decode: time of a token in vLLM, dense over packed, paired by round, with its 95 % interval "
            f"(`crepe-deploy bench` {result['decoding']})."
        )
    return "\n".join([*lines, "", conditions]) + "\n"


def print_table(result: dict[str, Any]) -> None:
    """The rows as one table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['model']} ({result['cores']} cores)")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in {"method", "pattern"} else "right")
    for row in result["rows"]:
        table.add_row(*(cell(row) for cell in COLUMNS.values()))
    Console(width=130).print(table)


def generate(folder: Path) -> str:
    """One greedy sentence from unmodified transformers, reading the exported folder from disk."""
    from ..model.architecture import whole_model
    from ..texts import load_tokenizer

    tokenizer, model = load_tokenizer(folder), whole_model(folder)
    tokens = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def serve_once(folder: Path) -> str:
    """Start `crepe-deploy serve` on a packed folder, take one completion over HTTP, and stop it."""
    command = [sys.executable, "-m", "crepe_deploy", "serve", str(folder), "--port", "0", "--json", "--enforce-eager"]
    with subprocess.Popen([*command, "--max-model-len", "512"], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise ServeError(f"'{' '.join(command)}' did not get ready; its messages are above")
        ready = json.loads(line)
        body = {"model": ready["model"], "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        request = urllib.request.Request(
            f"{ready['url']}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                return PROMPT + str(json.load(answer)["choices"][0]["text"])
        finally:
            server.send_signal(signal.SIGINT)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/demo"), show_default=True)
@click.option("--assets", "assets_dir", type=click.Path(path_type=Path), default=DEFAULT_DIR, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), default=None, help="Also write the rows here.")
@click.option(
    "--serve/--no-serve", default=True, show_default=True, help="Serve and measure the packed checkpoints with vLLM."
)
def main(out: Path, assets_dir: Path, json_path: Path | None, serve: bool) -> None:
    """Prune a real model with every method and print what each costs and keeps."""
    start = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    result = measure(out, assets_dir, lambda line: click.echo(line, err=True))
    dense, packed = out / SERVED / "dense", out / SERVED / "packed"
    click.echo(f"transformers, from {dense}:\n  {generate(dense)!r}\n")
    if serve:
        add_decode_speed(result, out, assets_dir)
        click.echo(f"vLLM, from {packed}:\n  {serve_once(packed)!r}\n")
    print_table(result)
    click.echo(markdown(result).split("\n\n")[-1])
    if json_path is not None:
        write_json(json_path, result)
        write_text(json_path.with_suffix(".md"), markdown(result))
    click.echo(f"done in {time.perf_counter() - start:.0f} s; the checkpoints are in {out}/", err=True)


if __name__ == "__main__":
    main()
