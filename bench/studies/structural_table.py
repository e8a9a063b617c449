"""The page of a structural grid: quality by sparsity, what the search cost, and the pace of judging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Cell = dict[str, Any]
OPTION = ", --"  # in the label of a row: from here on it names the option that it changes


def markdown(result: dict[str, Any]) -> str:
    """One table for each sparsity that was measured, and the throughput, as they are in the results file."""
    conditions, host = result["conditions"], result["environment"]["host"]
    dense = result["dense"]["perplexity"]["value"]
    searched = f"{conditions['search_samples']} further windows" if "search_samples" in conditions else "the same"
    lines = ["# Structural pruning: what was measured", "", *(f"    {command}" for command in result["commands"]), ""]
    lines.append(
        f"{conditions['model']}; calibrated on {conditions['samples']} x {conditions['length']} tokens of "
        f"{conditions['calibration']['text']}, a draw for each seed, searched on {searched}; scored on the first "
        f"{conditions['max_tokens']} tokens of {conditions['evaluation']['text']} in windows of "
        f"{conditions['window']}, dense perplexity {dense:.2f}. Searches: iterations x generations x offspring = "
        f"{conditions['iterations']} x {conditions['generations']} x {conditions['offspring']} "
        f"(the paper: 4 x 50 x 128), FFN units of {conditions['multiple']} neurons. Perplexities are geometric "
        "means over the seeds with their range, KL arithmetic means, in nats. FLAP-style, magnitude, random and what "
        "says so keep weights as they are; the others refit them. Only searches see further windows, and the time of "
        "the best split leaves out finding it where the Tyr row did. "
        f"Minutes are the median of whole runs, cores used: {host['cores']}, of {host['cpu']}, as it was, perhaps busy."
    )
    cells: dict[str, dict[str, list[Cell]]] = {}
    for key, cell in result["cells"].items():
        label, sparsity, _ = key.rsplit("|", 2)
        cells.setdefault(sparsity, {}).setdefault(label, []).append(cell)
    for sparsity in sorted(cells, key=float):
        rows = cells[sparsity]
        lines += ["", f"## {float(sparsity):.1%} of the linear parameters removed", ""]
        lines += _table({label: own for label, own in rows.items() if OPTION not in label})
        lines += ablations(rows)
    if "throughput" in result:
        lines += ["", "## Judging candidates", "", *_pace(result["throughput"])]
    return "\n".join(lines) + "\n"


def _table(rows: dict[str, list[Cell]]) -> list[str]:
    ordered = sorted(rows, key=lambda label: _mean_log(rows[label]))
    lines = [
        "| | seeds | PPL (lower is better) | range (lower is better) | KL to dense (lower is better) | "
        "parameters left | minutes (lower is better) |",
        "|---|---:|---:|---|---:|---:|---:|",
    ]
    for label in ordered:
        own = rows[label]
        values = [cell["perplexity"]["value"] for cell in own]
        kl = sum(cell["kl"]["value"] for cell in own) / len(own)
        kept = sorted({cell["parameters"]["kept"] for cell in own})
        minutes = sorted(cell["seconds"] for cell in own)[len(own) // 2] / 60
        lines.append(
            f"| {label} | {len(own)} | {math.exp(_mean_log(own)):.1f} | {min(values):.1f} to {max(values):.1f} | "
            f"{kl:.3f} | {' / '.join(f'{count:,}' for count in kept)} | {minutes:.1f} |"
        )
    return lines


def ablations(rows: dict[str, list[Cell]]) -> list[str]:
    """Rows with one option changed, each beside the row without the change on the same seeds."""
    lines = []
    for label in sorted(label for label in rows if OPTION in label):
        names = (label, label.partition(OPTION)[0])
        changed, kept = ({cell["config"]["seed"]: cell for cell in rows.get(name, [])} for name in names)
        seeds = sorted(changed.keys() & kept.keys())
        if not seeds:
            continue
        pairs = [(changed[seed], kept[seed]) for seed in seeds]
        ours, theirs = (_mean_log(cells) for cells in zip(*pairs, strict=True))
        kl, without = (sum(cell["kl"]["value"] for cell in cells) / len(seeds) for cells in zip(*pairs, strict=True))
        same = all(one["layers"] == other["layers"] for one, other in pairs)
        lines.append(
            f"| {label} | {', '.join(map(str, seeds))} | {math.exp(ours):.1f} | {math.exp(theirs):.1f} | "
            f"{math.exp(ours - theirs):.3g} | {kl:.3f} | {without:.3f} | {'the same' if same else 'others'} |"
        )
    if not lines:
        return []
    head = (
        "One option changed, beside the row without the change on the same seeds:", "",
        "| (lower is better) | seeds | PPL | without the change | ratio | KL to dense | without | widths |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    )  # fmt: skip
    return ["", *head, *lines]


def _mean_log(cells: Sequence[Cell]) -> float:
    return sum(math.log(cell["perplexity"]["value"]) for cell in cells) / len(cells)


def _pace(throughput: dict[str, Any]) -> list[str]:
    windows = throughput["windows"]
    rows = (
        (f"all {throughput['offspring']} on the same {windows['first_stage']} windows", throughput["same_windows"]),
        (f"a generation: staged selection against all on all {windows['all']} windows", throughput["generation"]),
    )
    lines = [
        f"{throughput['offspring']} children of the even distribution at {throughput['sparsity']:.0%}, windows of "
        f"{windows['length']} tokens, {throughput['threads']} threads, both ways in turn in one process. From scratch: "
        "one dense transformers model in memory, each candidate's masked matrices written into it, every window run "
        "whole. "
        f"The two ways' fitness differs by at most {throughput['largest_relative_fitness_difference']:.2%} (bf16).",
        "",
        "| (higher is better) | candidates a minute | from scratch | ratio | of processor time |",
        "|---|---:|---:|---:|---:|",
    ]
    for label, pace in rows:
        lines.append(
            f"| {label} | {pace['candidates_a_minute']:.1f} | {pace['from_scratch_a_minute']:.1f} | "
            f"{pace['ratio']:.1f} | {pace['processor_ratio']:.1f} |"
        )
    return lines
