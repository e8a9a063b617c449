"""The table of a quality grid: perplexities, and paired ratios with bootstrap intervals over windows."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

RESAMPLES = 2000
BASE = "RIA"
PHO, BARE = "CRePE, PHO's preset", "CRePE, PHO's preset without the neighbourhood"
CLIMB, NARROWED = "CRePE, hill climbing's preset", "CRePE, narrowed model's preset"
PAIRS = [
    *((ours, other) for ours in ("CRePE", PHO) for other in (BASE, "RIA, a = 1", "Wanda")),
    (PHO, BARE),
    (PHO, CLIMB),
    (PHO, NARROWED),
]


def rows_of(result: dict[str, Any], pattern: str, text: str) -> dict[str, np.ndarray[Any, Any]]:
    """For each row measured at `pattern` its losses (windows,) on `text`, averaged over its seeds."""
    by_label: dict[str, list[list[float]]] = {}
    for key, cell in result["cells"].items():
        label, at, _ = key.rsplit("|", 2)
        if at == pattern:
            by_label.setdefault(label, []).append(cell["losses"][text])
    return {label: np.asarray(losses).mean(0) for label, losses in by_label.items()}


def interval(differences: np.ndarray[Any, Any], seed: int = 0) -> tuple[float, float]:
    """Percentile interval (95 %) of exp(mean) of `differences` (windows,) over windows drawn with replacement."""
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.quantile(differences[draws].mean(1), [0.025, 0.975])
    return float(np.exp(low)), float(np.exp(high))


def closed(loss: float, base: float, dense: float) -> float:
    """The share of the base's loss over dense that a row closes."""
    return 1 - (loss - dense) / (base - dense)


def base_of(label: str) -> str:
    """The row that a row is compared with: RIA, calibrated on as many windows."""
    own = re.search(r", \d+ windows$", label)
    return BASE + (own.group() if own else "")


def markdown(result: dict[str, Any]) -> str:
    """A page with one table for each pattern; ratios and shares are against the mean of the seeds of `base_of`."""
    conditions = result["conditions"]
    mixed = ", equal shares of each," if " + " in conditions["calibration"]["text"] else ""
    lines = ["# Quality", "", *(f"    {command}" for command in result["commands"]), ""]
    lines += [
        f"{conditions['model']}; calibrated on {conditions['samples']} x {conditions['length']} tokens of "
        f"{conditions['calibration']['text']}{mixed} where the row does not say otherwise; scored on the first "
        f"{conditions['windows']} x {conditions['window']} tokens of each text. Perplexities are geometric means over "
        "the seeds. Ratios are to RIA calibrated on the same windows, paired over the windows scored, with 95 % "
        "bootstrap intervals over these; closed is the share of ln(PPL/dense) between RIA and dense. Prune s is the "
        "median time of pruning, proof and hashing included, on the machine as it was, perhaps busy.",
    ]
    patterns = list(dict.fromkeys(key.rsplit("|", 2)[1] for key in result["cells"]))
    texts = list(conditions["texts"])
    for pattern in patterns:
        dense = {text: float(np.mean(result["dense"][text])) for text in texts}
        head = [f"{text} PPL (dense {np.exp(dense[text]):.2f}; lower is better)" for text in texts]
        lines += ["", f"### {pattern}", ""]
        columns = [
            part
            for text, title in zip(texts, head, strict=True)
            for part in (title, f"{text} / RIA (lower is better)", "closed (higher is better)")
        ]
        lines += [
            "| row | seeds | " + " | ".join(columns) + " | prune s (lower is better) |",
            "|---" * (len(columns) + 3) + "|",
        ]
        labels = dict.fromkeys(key.rsplit("|", 2)[0] for key in result["cells"] if key.rsplit("|", 2)[1] == pattern)
        lines += [_line(result, label, pattern, texts, dense) for label in labels]
    return "\n".join([*lines, *_pairs(result, patterns, texts)]) + "\n"


def _pairs(result: dict[str, Any], patterns: list[str], texts: list[str]) -> list[str]:
    """CRePE against each of its rivals, and its searched preset against the same without its neighbourhood."""
    lines = []
    for pattern in patterns:
        rows = {text: rows_of(result, pattern, text) for text in texts}
        for first, second in PAIRS:
            if all(first in own and second in own for own in rows.values()):
                parts = [_ratio(own[first] - own[second]) for own in rows.values()]
                lines.append(f"| {pattern} | {first} / {second} | " + " | ".join(parts) + " |")
    if not lines:
        return []
    head = ["| ratio (lower is better): pattern | pair | " + " | ".join(texts) + " |", "|---" * (len(texts) + 2) + "|"]
    return ["", "## CRePE, pair by pair", "", "Ratios of perplexity, paired as above.", "", *head, *lines]


def _ratio(differences: np.ndarray[Any, Any]) -> str:
    low, high = interval(differences)
    return f"{np.exp(differences.mean()):.3f} [{low:.3f}, {high:.3f}]"


def _line(result: dict[str, Any], label: str, pattern: str, texts: list[str], dense: dict[str, float]) -> str:
    cells = {
        key.rsplit("|", 2)[2]: cell
        for key, cell in result["cells"].items()
        if key.rsplit("|", 2)[:2] == [label, pattern]
    }
    parts = [label, ", ".join(sorted(cells))]
    for text in texts:
        rows = rows_of(result, pattern, text)
        loss = rows[label]
        parts.append(f"{np.exp(loss.mean()):.1f}")
        base = base_of(label)
        if base not in rows or label == base:
            parts += ["", ""]
            continue
        share = closed(float(loss.mean()), float(rows[base].mean()), dense[text])
        parts += [_ratio(loss - rows[base]), f"{share:.0%}"]
    parts.append(f"{np.median([cell['seconds'] for cell in cells.values()]):.0f}")
    return "| " + " | ".join(parts) + " |"
