"""The tables of the healing study: perplexity against steps and processor time, and zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from .grid import Cell
from .heal_cells import IDLE_CORES, NARROWED, ZERO_SHOT, Piece, of_key, step_seconds

TEXTS: Final = ("wiki", "c4")
TASKS: Final = ("arc_easy", "piqa", "sciq", "lambada")
TITLES: Final = {"": "SmolLM2", NARROWED: "The second model: SmolLM2 narrowed, nothing retuned"}


def markdown(result: Mapping[str, Any]) -> str:
    """A curve for each model and start, and a table of tasks; of the cells that are there."""
    conditions = result["conditions"]
    rows: dict[Piece, list[tuple[int, Cell]]] = {}
    for key, cell in result["cells"].items():
        piece, seed = of_key(key)
        rows.setdefault(piece, []).append((seed, cell))
    lines = ["# Healing", "", *(f"    {command}" for command in result["commands"]), ""]
    lines += [
        f"{conditions['model']}. Perplexity of the first {conditions['max_tokens']} tokens of each test text, windows "
        f"of {conditions['window']}: geometric mean over the seeds; over the dense model's, with the lowest and the "
        "highest seed. CPU-minutes are of healing alone, looks at held-out text included; minutes are these over "
        f"{IDLE_CORES}. {_machines(result['cells'].values())}"
    ]  # fmt: skip
    for kind, title in TITLES.items():
        if dense := result.get(f"dense {kind}".strip()):
            lines += ["", f"## {title}", "", *_curve(kind, rows, dense)]
    if dense := result.get(f"dense {ZERO_SHOT}"):
        lines += ["", f"## Zero-shot accuracy, {conditions['documents']} documents of each task", ""]
        lines += _tasks(rows, dense["tasks"])
    return "\n".join(lines) + "\n"


def _machines(cells: Any) -> str:
    """Where the cells ran."""
    known = dict.fromkeys(
        f"{one['environment']['host']['cpu']} ({one['environment']['threads']} threads)" for one in cells
    )
    return f"Measured on {', '.join(known)}."


def _curve(kind: str, rows: Mapping[Piece, Sequence[tuple[int, Cell]]], dense: Mapping[str, Any]) -> list[str]:
    head = ["start", "steps", "seeds", "CPU-minutes (lower is better)"]
    head += [f"minutes on {IDLE_CORES} idle cores (lower is better)"]
    head += [
        f"{text} (dense {dense[text]['value']:.2f}; lower is better) | over dense (lower is better)" for text in TEXTS
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * (len(head) + len(TEXTS)) + "|"]
    for piece in _ordered(rows, kind):
        seeds, cells = zip(*sorted(rows[piece], key=lambda one: one[0]), strict=True)
        found = [_ratio([cell["perplexity"][text]["value"] for cell in cells], dense[text]["value"]) for text in TEXTS]
        line = [piece.start, str(piece.steps), ", ".join(map(str, seeds)), *_minutes(piece, cells), *found]
        lines.append("| " + " | ".join(line) + " |")
    return lines


def _ordered(rows: Mapping[Piece, Any], kind: str) -> list[Piece]:
    return sorted((piece for piece in rows if piece.kind == kind), key=lambda one: (one.start, one.steps))


def _minutes(piece: Piece, cells: Sequence[Cell]) -> tuple[str, str]:
    seconds = step_seconds(cells) if piece.steps else 0.0
    if seconds is None:
        return "", ""
    minutes = piece.steps * seconds / 60
    return f"{minutes:.1f}", f"{minutes / IDLE_CORES:.1f}"


def _ratio(values: Sequence[float], dense: float) -> str:
    mean = float(np.exp(np.mean(np.log(values))))
    spread = f" [{min(values) / dense:.2f}, {max(values) / dense:.2f}]" if len(values) > 1 else ""
    return f"{mean:.2f} | {mean / dense:.2f}{spread}"


def _tasks(rows: Mapping[Piece, Sequence[tuple[int, Cell]]], dense: Mapping[str, Any]) -> list[str]:
    head = " | ".join(["accuracy (higher is better): start", "steps", "seeds", *TASKS, "mean"])
    lines = [f"| {head} |", "|---" * (len(TASKS) + 4) + "|"]
    lines.append("| dense | | | " + _accuracies([dense]) + " |")
    for piece in _ordered(rows, ZERO_SHOT):
        seeds, cells = zip(*sorted(rows[piece], key=lambda one: one[0]), strict=True)
        found = _accuracies([cell["tasks"] for cell in cells])
        lines.append(f"| {piece.start} | {piece.steps} | {', '.join(map(str, seeds))} | {found} |")
    return lines


def _accuracies(found: Sequence[Mapping[str, Any]]) -> str:
    means = [float(np.mean([one[task]["acc"]["value"] for one in found])) for task in TASKS]
    return " | ".join(f"{value:.3f}" for value in (*means, float(np.mean(means))))
