"""What the demo shows of its result: a table, the models' own sentences, and a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .report.style import LIGHT, drawing, log_axis

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "method": lambda row: str(row["method"]),
    "pattern": lambda row: str(row["pattern"]),
    "zeros counted": lambda row: f"{row['sparsity']:.2%}",
    "PPL (lower is better)": lambda row: f"{row['perplexity']:.2f}",
    "KL to dense (lower is better)": lambda row: f"{row['kl']:.3f}" if row["kl"] is not None else "",
    "windows": lambda row: str(row.get("windows", "")),
    "s (lower is better)": lambda row: f"{row['seconds']:.1f}" if "seconds" in row else "",
    "peak MB (lower is better)": lambda row: f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
    "file MB (lower is better)": lambda row: f"{row['file_bytes'] / 1e6:.0f} {row['format']}",
    "decode speed over dense (higher is better)": lambda row: _decode_cell(row.get("decode_gain")),
}


def _decode_cell(gain: dict[str, Any] | None) -> str:
    return "" if gain is None else f"{gain['value']:.2f}x [{gain['low']:.2f}, {gain['high']:.2f}]"


def markdown(result: dict[str, Any]) -> str:
    """The rows as a Markdown table, the conditions and what the models say below."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    lines += ["| " + " | ".join(cell(row) for cell in COLUMNS.values()) + " |" for row in result["rows"]]
    lines += ["", conditions(result)]
    for prompt, said in result["sentences"].items():
        lines += [
            "",
            f"{prompt} ...",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {_cell(text)} |" for name, text in said.items()),
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def conditions(result: dict[str, Any]) -> str:
    """What the numbers were measured under, in a few sentences."""
    said = (
        f"{result['model']}, {result['dtype']}, {result['cores']} cores. Calibration: {result['calibration']}. "
        f"Evaluation: {result['evaluation']}, windows without overlap. Seconds and peak resident memory are those of "
        "the whole `prune-and-export` process, imports, proof, hashing and packing included; of the healed one those "
        "of `heal` alone."
    )
    if "decoding" in result:
        said += (
            f" Decode: time of a token in vLLM, dense over packed, paired by round, with its 95 % interval "
            f"(`crepe-deploy bench` {result['decoding']})."
        )
    return said


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


def show(result: dict[str, Any]) -> None:
    """The table, its conditions, and for each prompt what each model says, on stdout."""
    print_table(result)
    click.echo(conditions(result))
    for prompt, said in result["sentences"].items():
        click.echo(f"\n{prompt} ...")
        for name, text in said.items():
            click.echo(f"  {name:>19}  {text}")


def draw(result: dict[str, Any], path: Path) -> None:
    """A bar for each row, its perplexity over dense, with its size and speed beside it. Raises MissingExtra."""
    dense, rows = result["rows"][0], result["rows"][::-1]
    values = [row["perplexity"] / dense["perplexity"] for row in rows]
    with drawing(8, 1.2 + 0.42 * len(rows)) as (figure, (axes,)):
        names = [f"{row['method']}  {row['pattern']}".rstrip(" -") for row in rows]
        colours = [LIGHT[0] if row["format"] == "packed" else "#8c959f" for row in rows]
        bars = axes.barh(names, values, color=colours)
        axes.bar_label(bars, [_beside(row, value) for row, value in zip(rows, values, strict=True)], padding=4)
        if max(values) > 20:
            log_axis(axes)
        axes.set_xlim(0 if max(values) <= 20 else 0.8, max(values) * (1.8 if max(values) <= 20 else 8))
        axes.grid(visible=False)
        axes.set_xlabel(
            "perplexity over dense (lower is better; 1 is no loss)\nin brackets: weight files; blue: packed"
        )
        axes.set_title(f"{result['model']}, half of the blocks' weights removed")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(str(path), dpi=110, facecolor="white")


def _beside(row: dict[str, Any], value: float) -> str:
    speed = f", {row['decode_gain']['value']:.2f}x decode speed" if row.get("decode_gain") else ""
    return f"{value:.2f} ({row['file_bytes'] / 1e6:.0f} MB{speed})"
