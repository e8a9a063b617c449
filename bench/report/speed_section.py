"""Speed: percentiles, distributions, throughput against latency, paired differences."""

from __future__ import annotations

import statistics

from ..run.metrics import METRICS, by_round
from ..run.result import Interval, Point
from .charts import Words, distribution, forest, load_curve
from .compare import in_flight
from .content import Cell, Figure, Section, Table, cell, estimate, quantity, without_empty_columns
from .numbers import MISSING, capital, count, digits, si
from .samples import LATENCIES, LEVELS, pool, summarise
from .scene import Scene, describe

FOREST = ("tpot_s", "ttft_s", "itl_p99_s", "output_tokens_per_s")


def latency(scene: Scene) -> Section:
    """Percentile tables of TTFT, TPOT and ITL, and distributions at the points that stand for light and heavy load."""
    tables = tuple(table for kind in LATENCIES if (table := _percentiles(scene, kind)) is not None)
    figures = tuple(
        figure
        for kind, points in _distribution_points(scene).items()
        for i, point in enumerate(points)
        if (figure := _distribution(scene, kind, point, i)) is not None
    )
    glosses = " ".join(f"{kind.title}: {kind.gloss}." for kind in LATENCIES.values())
    text = (
        f"{glosses} p50, p90, p99: 50, 90 and 99 % of the samples are at most this; shown only where there are samples "
        "beyond it. All successful requests of all rounds together; failed ones count nowhere.",
    )
    missing = None if tables else "No latency is shown: no request succeeded."
    return Section(scene.name("latency"), "Latency", text if tables else (), figures, tables, missing)


def _percentiles(scene: Scene, kind: str) -> Table | None:
    rows = []
    for point in scene.run.workload.points:
        for entry in scene.comparison.entries:
            samples = pool(entry.candidate.series_at(point.name), LATENCIES[kind])
            intervals = summarise(samples)
            if intervals:
                cells = [_time(intervals.get(name)) for name in ("mean", *LEVELS)]
                counts = [Cell(count(n), n) for n in (samples.values.size, samples.round_count)]
                rows.append((cell(entry.name), cell(point.name), *cells, *counts))
    if not rows:
        return None
    columns = ("Candidate", "Point", "mean", *LEVELS, "Samples", "Rounds")
    points = "; ".join(describe(point) for point in scene.run.workload.points)
    caption = f"{LATENCIES[kind].title} with 95 % intervals over rounds (lower is better)"
    table = Table(scene.name(f"{kind}-percentiles"), caption, columns, tuple(rows), f"{points}; {scene.machine}")
    return without_empty_columns(table)


def _time(figure: Interval | None) -> Cell:
    if figure is None:
        return Cell(MISSING)
    return Cell(si(figure.value, "s", figure.low, figure.high), figure.value)


def _distribution_points(scene: Scene) -> dict[str, list[Point]]:
    comparison = scene.comparison
    pairs = {"itl": (comparison.headline, comparison.loaded), "ttft": (comparison.prompt, comparison.loaded)}
    distinct: dict[str, list[Point]] = {}
    for kind, points in pairs.items():
        distinct[kind] = list({point.name: point for point in points if point is not None}.values())
    return distinct


def _distribution(scene: Scene, kind: str, point: Point, index: int) -> Figure | None:
    title = LATENCIES[kind].title
    words = Words(
        scene.name(f"{kind}-cdf{index or ''}"), f"{title} at {point.name}: further left is better", f"{title} (ms)",
        "samples at most this (%)", scene.at(point), scene.name(f"{kind}-percentiles"),
    )  # fmt: skip
    return distribution(scene.comparison, point, kind, words)


def load(scene: Scene) -> Section:
    """Throughput against latency over points that differ only in how much is asked at once."""
    sets: dict[tuple[int, int, bool], list[Point]] = {}
    for point in scene.run.workload.points:
        key = (point.prompt_tokens, point.output_tokens, point.concurrency is not None)
        sets.setdefault(key, []).append(point)
    figures = []
    for i, points in enumerate(group for group in sets.values() if len({in_flight(p) for p in group}) > 1):
        one, served = points[0], points[0].concurrency is not None
        kind = "requests in flight" if served else "batch"
        words = Words(
            scene.name(f"load{i or ''}"), "Time per token against throughput: lower right is better",
            "output throughput (tokens/s)", "time per output token (ms)",
            f"{kind} {', '.join(str(in_flight(p)) for p in sorted(points, key=in_flight))} (numbers at the baseline's "
            f"curve), {one.prompt_tokens} prompt + {one.output_tokens} output tokens; {scene.machine}",
            scene.name("load-table"),
        )  # fmt: skip
        figure = load_curve(scene.comparison, points, words)
        if figure is not None:
            figures.append(figure)
    title = "Throughput and load"
    if not figures:
        reason = "No curve is shown: no two points differ only in batch size or in requests in flight."
        return Section(scene.name("load"), title, missing=reason)
    return Section(scene.name("load"), title, (), tuple(figures), (_load_table(scene),))


def _load_table(scene: Scene) -> Table:
    names = ("output_tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s", "tpot_s", "latency_s")
    rows = []
    for point in scene.run.workload.points:
        for entry in scene.comparison.entries:
            rounds = [by_round(entry.candidate.series_at(point.name), METRICS[name]) for name in names]
            values = [statistics.median(figures) if figures else None for figures in rounds]
            if any(value is not None for value in values):
                cells = [quantity(value, METRICS[name].unit) for value, name in zip(values, names, strict=True)]
                rows.append(
                    (cell(entry.name), cell(point.name), Cell(count(in_flight(point)), in_flight(point)), *cells)
                )
    columns = (
        "Candidate",
        "Point",
        "At once",
        *(f"{capital(METRICS[name].title)} ({METRICS[name].better} is better)" for name in names),
    )
    table = Table(scene.name("load-table"), "Absolute speed, median over rounds", columns, tuple(rows), scene.machine)
    return without_empty_columns(table)


def differences(scene: Scene) -> Section:
    """Every metric's paired ratio to the baseline, as forest plots and as one table."""
    title = "Paired differences"
    rows = []
    for entry in scene.comparison.others:
        for pair in entry.pairs.values():
            if pair.ratio is None:
                continue
            metric = METRICS[pair.metric]
            noise = scene.comparison.noise(pair.point, pair.metric)
            rows.append(
                (
                    cell(entry.name), cell(pair.point), cell(capital(metric.title)), estimate(pair.ratio, "×"),
                    cell(f"{metric.better} is better"), Cell(count(pair.rounds), pair.rounds),
                    Cell(MISSING) if not noise else Cell(f"±{digits(100 * noise)} %", noise),
                )
            )  # fmt: skip
    if not rows:
        alone = "The baseline is the only candidate." if not scene.comparison.others else None
        reason = alone or "No candidate shares a round with the baseline."
        return Section(scene.name("differences"), title, missing=reason)
    columns = ("Candidate", "Point", "Metric", "Ratio to the baseline", "Direction", "Rounds", "Noise floor")
    caption = "Ratios to the baseline paired round by round, with 95 % intervals"
    name = scene.name("differences-table")
    table = without_empty_columns(Table(name, caption, columns, tuple(rows), scene.machine))
    figures = tuple(figure for metric in FOREST if (figure := _forest(scene, metric, name)) is not None)
    text: tuple[str, ...] = (
        "Each round measures all candidates in turn, so a ratio within a round is freer of the machine's mood than "
        "either time. An interval that spans 1 shows no difference.",
    )
    if scene.run.noise:
        text += ("Shaded: what two equal candidates differ by on this machine (the noise floor).",)
    return Section(scene.name("differences"), title, text, figures, (table,))


def _forest(scene: Scene, metric: str, table: str) -> Figure | None:
    shown = METRICS[metric]
    way = "left" if shown.better == "lower" else "right"
    title = f"{capital(shown.title)}: {way} of the line is better"
    words = Words(
        scene.name(f"forest-{metric.replace('_', '-')}"), title, "ratio to the baseline", "", scene.machine, table
    )
    return forest(scene.comparison, metric, words)
