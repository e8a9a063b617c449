"""The top of a chapter: every candidate against the baseline in one table and in plain words."""

from __future__ import annotations

import math

from ..run.result import Interval
from .compare import Comparison, Entry, failed_requests
from .content import Cell, Table, cell, estimate, without_empty_columns
from .numbers import digits, plural, si
from .scene import Scene

SAME_WITHIN = 0.005


def summary_table(scene: Scene) -> Table:
    """Quality, memory and speed of every candidate, as ratios to the baseline."""
    comparison = scene.comparison
    points = [(comparison.headline, "Decode speed", "decode_tokens_per_s", "higher is better")]
    points.append((comparison.loaded, "Throughput", "output_tokens_per_s", "higher is better"))
    points.append((comparison.prompt, "Time to first token", "ttft_s", "lower is better"))
    shown = [(point, title, metric, way) for point, title, metric, way in points if point is not None]
    columns = ["Candidate", "In words", "Weight files (lower is better)", "Perplexity × (lower is better)"]
    columns += [f"{title} × ({point.name}, {way})" for point, title, _, way in shown]
    rows = []
    for entry in comparison.entries:
        row = [
            cell(entry.name),
            cell(words(entry, comparison)),
            _weights(entry),
            estimate(entry.perplexity_ratio(), "×"),
        ]
        row += [estimate(entry.ratio(point.name, metric), "×") for point, _, metric, _ in shown]
        rows.append(tuple(row))
    caption = (
        f"Every candidate against the baseline “{scene.run.baseline}”, with 95 % intervals: "
        "of speeds over rounds, of perplexity over windows of text"
    )
    table = Table(scene.name("summary"), caption, tuple(columns), tuple(rows), scene.machine)
    return without_empty_columns(table)


def _weights(entry: Entry) -> Cell:
    size = entry.candidate.memory.weights_bytes
    return Cell(si(size, "B") + (f" ({digits(entry.weights)}×)" if entry.weights is not None else ""), size)


def words(entry: Entry, comparison: Comparison) -> str:
    """What a candidate gained and lost, in words; a difference whose interval spans 1 is no clear difference."""
    if entry.baseline:
        return "the baseline"
    said = [f"{entry.kind}: {_bytes(entry.weights)}"]
    if comparison.headline is not None:
        point, metric = comparison.headline.name, "decode_tokens_per_s"
        said.append(_speed(entry.ratio(point, metric), math.exp(comparison.noise(point, metric))))
    said.append(_perplexity(entry.perplexity_ratio()))
    if not entry.same_engine:
        said.append(f"another engine than the baseline ({entry.candidate.engine})")
    if failed := failed_requests(entry):
        said.append(f"{plural(failed, 'failed request')}")
    return ", ".join(said)


def _bytes(ratio: float | None) -> str:
    if ratio is None:
        return "size unknown"
    if abs(ratio - 1) < SAME_WITHIN:
        return "same size"
    return f"{digits(100 * abs(1 - ratio), 2)} % {'smaller' if ratio < 1 else 'larger'}"


def _speed(ratio: Interval | None, floor: float) -> str:
    if ratio is None:
        return "speed not measured"
    if ratio.low is None or ratio.high is None:
        return f"decodes at {digits(ratio.value)}× speed, in one round only"
    if ratio.low > floor:
        return f"decodes {digits(ratio.value)}× as fast"
    if ratio.high < 1 / floor:
        return f"decodes slower, {digits(ratio.value)}× as fast"
    return "no clear difference in decoding speed"


def _perplexity(ratio: Interval | None) -> str:
    if ratio is None:
        return "quality not measured"
    if ratio.low is not None and ratio.high is not None and ratio.low <= 1 <= ratio.high:
        return "no clear loss of quality"
    return f"perplexity {digits(ratio.value)}×"
