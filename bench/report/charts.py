"""Figures of points and curves: trade-offs, throughput against latency, distributions, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..run.metrics import METRICS, by_round
from ..run.result import Interval, Point
from .compare import Comparison, Entry, in_flight
from .content import Figure
from .numbers import digits, interval, si
from .samples import LATENCIES, Pool, pool
from .style import BAND, INK, drawable, drawing, legend_below, log_axis, look, ratio_axis, render, short

CURVE_STEPS = 200
MOST_ROWS = 400  # of a forest plot: longer ones are left to the table


@dataclass(frozen=True)
class Spot:
    """One candidate in a trade-off: x and y as ratios to the baseline, with intervals where there are any."""

    entry: Entry
    x: Interval
    y: Interval


@dataclass(frozen=True)
class Words:
    """The texts of a figure."""

    name: str
    title: str
    x: str
    y: str
    conditions: str
    table: str


def frontier(spots: Sequence[Spot], higher_x: bool) -> list[Spot]:
    """The spots that no other beats in both directions, from the best x to the worst; y is better lower."""
    sign = -1.0 if higher_x else 1.0
    best: list[Spot] = []
    for spot in sorted(spots, key=lambda spot: (sign * spot.x.value, spot.y.value)):
        if not best or spot.y.value < best[-1].y.value:
            best.append(spot)
    return best


def trade_off(spots: Sequence[Spot], words: Words, higher_x: bool) -> Figure | None:
    """A Pareto chart: the frontier as a line, every candidate with its marker; None for fewer than two spots."""
    if len(spots) < 2:
        return None
    best = frontier(spots, higher_x)
    with drawing(height=4.2) as (drawn, [axes]):
        line = [(drawable(spot.x).value, drawable(spot.y).value) for spot in best]
        axes.plot(*zip(*line, strict=True), color=INK, linewidth=1, linestyle=":", zorder=1)
        handles = []
        for spot in spots:
            style, x, y = look(spot.entry), drawable(spot.x), drawable(spot.y)
            handles.append(
                axes.errorbar(
                    x.value,
                    y.value,
                    xerr=_error_bars(x),
                    yerr=_error_bars(y),
                    fmt=style.marker,
                    color=style.colour,
                    markersize=8,
                    elinewidth=1.4,
                    capsize=3,
                )
            )
        ratio_axis(axes, "x", _ends([spot.x for spot in spots]))
        ratio_axis(axes, "y", _ends([spot.y for spot in spots]))
        axes.set(xlabel=words.x, ylabel=words.y)
        legend_below(drawn, handles, [look(spot.entry).label for spot in spots])
        svg, png = render(drawn, words.name, words.title, words.conditions)
    names = ", ".join(f"“{spot.entry.name}”" for spot in best)
    spots_said = "; ".join(f"“{s.entry.name}” at {interval(s.x, '×')} and {interval(s.y, '×')}" for s in spots)
    alternative = f"{words.x} against {words.y}: {spots_said}. On the frontier (dotted line): {names}."
    return Figure(words.name, words.title, alternative, words.conditions, words.table, svg, png)


def _error_bars(ratio: Interval) -> list[list[float]] | None:
    if ratio.low is None or ratio.high is None:
        return None
    return [[max(ratio.value - ratio.low, 0.0)], [max(ratio.high - ratio.value, 0.0)]]


def _ends(intervals: Sequence[Interval]) -> list[float]:
    return [end for ratio in intervals for end in (ratio.value, ratio.low, ratio.high) if end is not None]


def load_curve(comparison: Comparison, points: Sequence[Point], words: Words) -> Figure | None:
    """Time per token against throughput, one curve a candidate, over points that differ in sequences at once only."""
    curves = {entry.index: curve(entry, points) for entry in comparison.entries}
    shown = [entry for entry in comparison.entries if len(curves[entry.index]) > 1]
    if not shown:
        return None
    with drawing(height=4.2) as (drawn, [axes]):
        handles = []
        for entry in shown:
            style = look(entry)
            xs = [x for _, x, _ in curves[entry.index]]
            ys = [1e3 * y for _, _, y in curves[entry.index]]
            line = axes.plot(xs, ys, color=style.colour, marker=style.marker, linestyle=style.dash, markersize=6)
            handles.append(line[0])
            for load, x, y in curves[entry.index] if entry is shown[0] else []:
                axes.annotate(str(load), (x, 1e3 * y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
        axes.set(xlabel=words.x, ylabel=words.y)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.margins(0.1)
        legend_below(drawn, handles, [look(entry).label for entry in shown])
        svg, png = render(drawn, words.name, words.title, words.conditions)
    said = [f"“{entry.name}”: " + ", ".join(_said(*spot) for spot in curves[entry.index]) for entry in shown]
    return Figure(words.name, words.title, "; ".join(said) + ".", words.conditions, words.table, svg, png)


def _said(load: int, tokens_per_s: float, time_s: float) -> str:
    return f"{load} at once {digits(tokens_per_s)} tokens/s, {si(time_s, 's')}"


def curve(entry: Entry, points: Sequence[Point]) -> list[tuple[int, float, float]]:
    """(sequences at once, output tokens/s, seconds per token) of a candidate at each point it was measured at."""
    spots = []
    for point in sorted(points, key=in_flight):
        series = entry.candidate.series_at(point.name)
        speed = by_round(series, METRICS["output_tokens_per_s"])
        time = by_round(series, METRICS["tpot_s"])
        if speed and time:
            spots.append((in_flight(point), float(np.median(speed)), float(np.median(time))))
    return spots


def distribution(comparison: Comparison, point: Point, kind: str, words: Words) -> Figure | None:
    """Cumulative distribution of one latency at one point, a curve a candidate; None where samples are too few."""
    pools = {entry.index: pool(entry.candidate.series_at(point.name), LATENCIES[kind]) for entry in comparison.entries}
    shown = [entry for entry in comparison.entries if pools[entry.index].values.size >= 10]
    if not shown:
        return None
    with drawing(height=4.0) as (drawn, [axes]):
        handles = []
        for entry in shown:
            style = look(entry)
            xs, ys = steps(pools[entry.index])
            handles += axes.plot(
                1e3 * xs, 100 * ys, color=style.colour, linestyle=style.dash, linewidth=1.6, marker=style.marker,
                markevery=(0.1 + 0.02 * entry.index, 0.2), markersize=5,
            )  # fmt: skip
        everything = np.concatenate([pools[entry.index].values for entry in shown])
        if everything.min() > 0 and everything.max() / everything.min() > 20:
            log_axis(axes)
        axes.set(xlabel=words.x, ylabel=words.y, ylim=(0, 102))
        legend_below(drawn, handles, [look(entry).label for entry in shown])
        svg, png = render(drawn, words.name, words.title, words.conditions)
    said = [
        f"“{entry.name}” median {si(float(np.median(pools[entry.index].values)), 's')}, "
        f"90 % within {si(float(np.quantile(pools[entry.index].values, 0.9)), 's')}"
        for entry in shown
    ]
    return Figure(words.name, words.title, "; ".join(said) + ".", words.conditions, words.table, svg, png)


def steps(samples: Pool) -> tuple[np.ndarray, np.ndarray]:
    """The empirical distribution, thinned to at most CURVE_STEPS points that keep both ends."""
    size = samples.values.size
    ranks = np.unique(np.linspace(0, size - 1, min(size, CURVE_STEPS)).round().astype(int))
    return samples.values[ranks], (ranks + 1) / size


def forest(comparison: Comparison, metric: str, words: Words) -> Figure | None:
    """Paired ratios of one metric with intervals, by point and candidate; the noise floor shaded where known."""
    groups = [
        (
            point,
            [(entry, ratio) for entry in comparison.others if (ratio := entry.ratio(point.name, metric)) is not None],
        )
        for point in comparison.run.workload.points
    ]
    groups = [(point, pairs) for point, pairs in groups if pairs]
    rows = sum(1 + len(pairs) for _, pairs in groups)
    if not 0 < rows <= MOST_ROWS:
        return None
    height = 1.0 + 0.27 * rows
    ticks: list[tuple[float, str, bool]] = []
    with drawing(height=height) as (drawn, [axes]):
        place = 0.0
        for point, pairs in groups:
            ticks.append((place, short(point.name), True))
            noise = comparison.noise(point.name, metric)
            if noise:
                axes.fill_betweenx(
                    [place + 0.4, place + len(pairs) + 0.6], float(np.exp(-noise)), float(np.exp(noise)), color=BAND
                )
            for entry, ratio in pairs:
                place += 1
                style, shown = look(entry), drawable(ratio)
                axes.errorbar(
                    shown.value, place, xerr=_error_bars(shown), fmt=style.marker, color=style.colour, markersize=6,
                    elinewidth=1.6, capsize=3,
                )  # fmt: skip
                ticks.append((place, style.label, False))
            place += 1
        axes.axvline(1, color=INK, linewidth=1, zorder=1)
        axes.set_yticks([at for at, _, _ in ticks], [text for _, text, _ in ticks])
        for label, (_, _, heading) in zip(axes.get_yticklabels(), ticks, strict=True):
            label.set_fontweight("bold" if heading else "normal")
            label.set_fontsize(9)
        axes.set_ylim(place - 0.3, -0.7)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        ratio_axis(axes, "x", _ends([ratio for _, pairs in groups for _, ratio in pairs]))
        axes.set_xlabel(words.x)
        svg, png = render(drawn, words.name, words.title, words.conditions)
    said = [
        f"{point.name}: " + ", ".join(f"“{entry.name}” {interval(ratio, '×')}" for entry, ratio in pairs)
        for point, pairs in groups
    ]
    return Figure(words.name, words.title, "; ".join(said) + ".", words.conditions, words.table, svg, png)
