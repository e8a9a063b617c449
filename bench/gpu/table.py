"""The table of docs/gpu.md, made from the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ...errors import ConfigError

BEGIN: Final = "<!-- gpu results: made by bench/gpu/run.py -->"
END: Final = "<!-- end of gpu results -->"
NOTHING: Final = "No GPU figure exists yet."


def render(results: dict[str, Any]) -> str:
    """Markdown: the machine, one row a shape and pattern with the ratio for each batch, and the model's rows."""
    if results["rehearsal"]:
        return "A rehearsal: its numbers mean nothing."
    pruned = results.get("prune", {})
    if not results["layers"] and not results["model"] and not pruned:
        return NOTHING
    parts = [device_line(results["machine"]["device"]), layer_table(results["layers"]), model_table(results)]
    return "\n\n".join([*parts, prune_table(pruned)] if pruned else parts)


def device_line(device: dict[str, Any]) -> str:
    """Device, versions, bandwidth."""
    facts = device["valid_for"]
    return (
        f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, cuSPARSELt {facts['cusparselt']}; copy "
        f"{device['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 product {device['bf16_product_flop_per_s'] / 1e12:.0f} "
        "TFLOP/s. Over the best dense baseline, bf16, cold cache, CUDA graphs, medians; in brackets the share of the "
        "copy bandwidth."
    )


def layer_table(layers: dict[str, list[dict[str, Any]]]) -> str:
    """Ratio over dense by batch; a wrong result is marked."""
    table: dict[tuple[str, str], dict[int, str]] = {}
    for name, rows in layers.items():
        for row in rows:
            cell = f"{row['over_dense']:.2f} ({row['of_copy_bandwidth']:.0%})" + ("" if row["correct"] else " WRONG")
            table.setdefault((name.rpartition("/")[0], row["pattern"]), {})[row["batch"]] = cell
    batches = sorted({batch for cells in table.values() for batch in cells})
    lines = [
        "| speed over dense (higher is better): layer | pattern | "
        + " | ".join(f"batch {batch}" for batch in batches)
        + " |"
    ]
    lines.append("|---|---|" + "---:|" * len(batches))
    for (layer, pattern), cells in table.items():
        lines.append(f"| {layer} | {pattern} | " + " | ".join(cells.get(batch, "") for batch in batches) + " |")
    return "\n".join(lines)


def model_table(results: dict[str, Any]) -> str:
    """Milliseconds and ratios of the whole model; empty until the dense one was measured."""
    rows = results["model"]
    if "dense" not in rows:
        return ""
    lines = [
        "| random Llama-3.1-8B | decode ms (lower is better) | over dense (higher is better) | "
        "prefill ms (lower is better) | over dense (higher is better) | GB (lower is better) |"
    ]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        cells = [name]
        for what in ("decode", "prefill"):
            cells += [f"{row['ms'][what]:.2f}", f"{rows['dense']['ms'][what] / row['ms'][what]:.2f}"]
        lines.append("| " + " | ".join([*cells, f"{row['resident_bytes'] / 1e9:.2f}"]) + " |")
    return "\n".join(lines)


def prune_table(rows: dict[str, dict[str, Any]]) -> str:
    """Seconds a block on either side, the device's peak memory, and the share of equal mask entries."""
    lines = [
        "| pruned, Llama-3.1-8B's width | CPU s a block (lower is better) | device s a block (lower is better) | "
        "peak GB (lower is better) | equal masks (higher is better) |"
    ]
    lines.append("|---|---:|---:|---:|---:|")
    for name, row in rows.items():
        seconds = [f"{row[place]['seconds_a_block']:.2f}" for place in ("cpu", "device")]
        peak = row["device"]["peak_bytes"] / 1e9
        wrong = "" if row["correct"] else " WRONG"
        lines.append(f"| {name} | {' | '.join(seconds)} | {peak:.2f} | {row['masks']['own_statistics']:.4%}{wrong} |")
    return "\n".join(lines)


def write_into(page: Path, text: str) -> None:
    """Put the table between the page's markers. Raises ConfigError when they are not there."""
    content = page.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ConfigError(f"{page} has no place for the table; it needs the lines {BEGIN} and {END}")
    head, _, rest = content.partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
