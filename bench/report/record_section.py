"""What stands behind the numbers: runs over time, failed requests, conditions."""

from __future__ import annotations

import json
import statistics
from collections import Counter

from ..run.metrics import METRICS, by_round, errors
from ..run.result import Interval, Run, workload_sha256
from .bars import history as history_figure
from .charts import Words
from .compare import Comparison, Entry, compare
from .content import Cell, Section, Table, cell, estimate, fraction, quantity, without_empty_columns
from .loading import Source
from .numbers import count, plural, si
from .scene import Scene, describe


def history(scene: Scene) -> Section:
    """Decode speed, size and quality of each candidate over the runs of this scenario."""
    title, sources = "History", scene.group.sources
    if len(sources) < 2:
        reason = "One run of this scenario was given. Give several to see how its figures move over commits."
        return Section(scene.name("history"), title, missing=reason)
    comparisons = [compare(source.run) for source in sources]
    labels = [_label(source) for source in sources]
    headline = scene.comparison.headline
    rows = []
    for label, comparison in zip(labels, comparisons, strict=True):
        for entry in comparison.entries:
            ratio = _ratio(comparison, entry.name, headline.name) if headline is not None else None
            time = _time(entry, headline.name) if headline is not None else None
            rows.append(
                (
                    cell(label), cell(entry.name), estimate(ratio, "×"), quantity(time, "s"),
                    quantity(entry.candidate.memory.weights_bytes, "B"), estimate(entry.perplexity_ratio(), "×"),
                )
            )  # fmt: skip
    columns = (
        "Run", "Candidate", "Decode speed × (higher is better)", "Time per output token (lower is better)",
        "Weight files (lower is better)", "Perplexity × (lower is better)",
    )  # fmt: skip
    table = Table(
        scene.name("history-table"), "Every run of this scenario, oldest first; ratios are to that run's own baseline",
        columns, tuple(rows), scene.at(headline),
    )  # fmt: skip
    figure = None
    if headline is not None:
        lines = [
            (entry, [_ratio(comparison, entry.name, headline.name) for comparison in comparisons])
            for entry in scene.comparison.others
        ]
        words = Words(
            scene.name("history-figure"), "Decode speed over runs: higher is better", "run",
            "decode speed over the baseline's", scene.at(headline), scene.name("history-table"),
        )  # fmt: skip
        figure = history_figure(labels, lines, words)
    figures = () if figure is None else (figure,)
    return Section(scene.name("history"), title, (), figures, (without_empty_columns(table),))


def _label(source: Source) -> str:
    commit = source.run.environment.commit
    return f"{source.run.created[:10]} {commit[:7] if commit else source.sha256[:7]}"


def _ratio(comparison: Comparison, name: str, point: str) -> Interval | None:
    entry = next((entry for entry in comparison.entries if entry.name == name), None)
    return None if entry is None or entry.baseline else entry.ratio(point, "decode_tokens_per_s")


def _time(entry: Entry, point: str) -> float | None:
    values = by_round(entry.candidate.series_at(point), METRICS["tpot_s"])
    return statistics.median(values) if values else None


def failures(scene: Scene) -> Section:
    """Failed requests, and comparisons that could not be made."""
    title = "Errors"
    rows = []
    for entry in scene.comparison.entries:
        for series in entry.candidate.series:
            total = sum(len(visit.requests) for visit in series.visits)
            for message, number in Counter(errors(series)).most_common():
                rows.append(
                    (
                        cell(entry.name), cell(series.point), Cell(count(number), number), Cell(count(total), total),
                        fraction(number / total), cell(message[:300]),
                    )
                )  # fmt: skip
    missing = [
        f"“{entry.name}” could not be compared at {point}: {next(iter(reasons))}."
        for entry in scene.comparison.others
        for point, reasons in _reasons(entry).items()
    ]
    if not rows:
        return Section(scene.name("errors"), title, ("No request failed.", *missing))
    columns = ("Candidate", "Point", "Failed (lower is better)", "Requests", "Share (lower is better)", "Message")
    caption = "Failed requests; they enter no latency figure"
    table = Table(scene.name("errors-table"), caption, columns, tuple(rows), scene.machine)
    return Section(scene.name("errors"), title, tuple(missing), (), (table,))


def _reasons(entry: Entry) -> dict[str, set[str]]:
    """Why no metric at all could be compared at a point, by point."""
    points = {pair.point for pair in entry.pairs.values()}
    return {
        point: {pair.reason for pair in entry.pairs.values() if pair.point == point and pair.reason is not None}
        for point in sorted(points)
        if all(pair.ratio is None for pair in entry.pairs.values() if pair.point == point)
    }


def conditions(scene: Scene) -> Section:
    """Everything the numbers depend on, run by run, and what each candidate is."""
    tables = [_conditions_table(scene, source, i) for i, source in enumerate(scene.group.sources)]
    return Section(scene.name("conditions"), "Conditions", (), (), (_candidates(scene), *tables))


def _candidates(scene: Scene) -> Table:
    rows = []
    for entry in scene.comparison.entries:
        candidate = entry.candidate
        notes = "; ".join(
            f"{key}: {_plain(value)}" for key, value in candidate.notes.items() if value not in ({}, [], "", None)
        )
        texts = (
            candidate.kind,
            candidate.engine,
            candidate.method,
            candidate.pattern,
            candidate.format,
            candidate.folder,
        )
        cells = [cell(text or "–") for text in (*texts, candidate.model_sha256[:12], notes)]
        rows.append((cell(candidate.name), *cells))
    columns = ("Candidate", "Kind", "Engine", "Method", "Pattern", "Format", "Folder", "Model sha256", "Notes")
    return without_empty_columns(
        Table(scene.name("candidates"), "What each candidate is", columns, tuple(rows), scene.machine)
    )


def _conditions_table(scene: Scene, source: Source, index: int) -> Table:
    run = source.run
    pairs = [(key, value) for key, value in _facts(run) if value]
    pairs += [("Run file", source.path.name), ("Run file sha256", source.sha256)]
    rows = tuple((cell(key), cell(value)) for key, value in pairs)
    caption = f"Conditions of the run of {run.created}"
    folded = index < len(scene.group.sources) - 1  # the latest stays open
    return Table(scene.name(f"conditions-{index}"), caption, ("Condition", "Value"), rows, "", folded)


def _facts(run: Run) -> list[tuple[str, str]]:
    environment, workload = run.environment, run.workload
    host = environment.host
    clock = f"{environment.clock_mhz:.0f} MHz" if environment.clock_mhz else ""
    facts = [
        ("Scenario", run.name), ("Command", run.command), ("Taken", run.created),
        ("Duration", f"{run.seconds / 60:.1f} min"),
        ("Resumed", ", ".join(f"after round {one.after_round} ({one.at})" for one in run.resumed)),
        ("Commit", environment.commit or ""),
        ("CPU", f"{host.cpu}, {plural(host.cores, 'core')}"), ("Kernel instruction set", host.isa),
        ("GPU", ", ".join(host.gpu)), ("Memory", si(host.memory_bytes, "B")), ("System", host.system),
        ("Threads", str(environment.threads)), ("Clock", clock),
        ("Load average before, after", f"{environment.load[0]:.2f}, {environment.load[1]:.2f}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in environment.versions.items())),
        ("Variables", ", ".join(f"{name}={value}" for name, value in environment.variables.items())),
        ("Baseline", run.baseline), ("Number format", workload.dtype), ("Seed", str(workload.seed)),
        ("Workload options", ", ".join(f"{key}={_plain(value)}" for key, value in workload.options.items())),
    ]  # fmt: skip
    facts += [(f"Point {i}", describe(point)) for i, point in enumerate(workload.points, 1)]
    return [*facts, ("Workload sha256", workload_sha256(workload))]


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
