"""Figures of bars and of history: memory, layers block by block, one scenario over commits."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..run.result import Interval, Layer
from .charts import Words
from .compare import Entry
from .content import Figure
from .numbers import digits, interval, si
from .style import INK, drawable, drawing, legend_below, look, ratio_axis, render, short

_BLOCK = re.compile(r"(?:^|\.)(\d{1,5})\.")
_SCALES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


@dataclass(frozen=True)
class Stack:
    """A candidate's memory in bytes; None for what is not known."""

    entry: Entry
    weights: int
    cache: int | None
    rest: int | None


def memory_stack(stacks: Sequence[Stack], words: Words) -> Figure | None:
    """Stacked horizontal bars of weights, KV cache and the rest of the peak."""
    if not stacks:
        return None
    most = max(stack.weights + (stack.cache or 0) + (stack.rest or 0) for stack in stacks)
    scale, unit = next((known for known in _SCALES if most >= known[0]), _SCALES[-1])
    with drawing(height=1.3 + 0.42 * len(stacks)) as (drawn, [axes]):
        from matplotlib.patches import Patch

        for row, stack in enumerate(stacks):
            colour, left = look(stack.entry).colour, 0.0
            parts = ((stack.weights, ""), (stack.cache or 0, "/////"), (stack.rest or 0, "...."))
            for size, hatch in parts:
                face = "none" if hatch else colour
                axes.barh(row, size / scale, 0.62, left, facecolor=face, edgecolor=colour, hatch=hatch)
                left += size / scale
        axes.set_yticks(range(len(stacks)), [look(stack.entry).label for stack in stacks], fontsize=9)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(words.x.format(unit=unit))
        names = ["weight files"]
        names += ["KV cache"] if any(stack.cache for stack in stacks) else []
        names += ["rest of the peak"] if any(stack.rest for stack in stacks) else []
        hatches = {"weight files": "", "KV cache": "/////", "rest of the peak": "...."}
        handles = [Patch(facecolor="none" if hatches[n] else INK, edgecolor=INK, hatch=hatches[n]) for n in names]
        drawn.legend(handles, names, loc="outside lower center", ncols=3, columnspacing=1.2)
        svg, png = render(drawn, words.name, words.title, words.conditions)
    said = [
        f"“{s.entry.name}”: weights {si(s.weights, 'B')}, KV cache {si(s.cache, 'B')}, rest {si(s.rest, 'B')}"
        for s in stacks
    ]
    return Figure(words.name, words.title, "; ".join(said) + ".", words.conditions, words.table, svg, png)


def block_of(layer: Layer) -> int | None:
    """The decoder block that a layer's name counts, such as 12 in model.layers.12.mlp.up_proj."""
    match = _BLOCK.search(layer.name)
    return int(match[1]) if match else None


def by_block(layers: Sequence[Layer], of: Callable[[Layer], float | None]) -> dict[int, float]:
    """The mean of a figure over each block's layers, weighted by their weights; unknown ones are left out."""
    sums: dict[int, tuple[float, float]] = {}
    for layer in layers:
        block, value = block_of(layer), of(layer)
        if block is not None and value is not None:
            size = float(layer.shape[0] * layer.shape[1])
            total, weight = sums.get(block, (0.0, 0.0))
            sums[block] = (total + size * value, weight + size)
    return {block: total / weight for block, (total, weight) in sorted(sums.items()) if weight}


def block_bars(values: Sequence[tuple[Entry, dict[int, float]]], words: Words, scale: float = 1.0) -> Figure | None:
    """One panel a candidate with a bar for each decoder block, all on one scale."""
    values = [(entry, blocks) for entry, blocks in values if blocks]
    if not values:
        return None
    top = max(scale * value for _, blocks in values for value in blocks.values())
    with drawing(height=0.8 + 0.85 * len(values), rows=len(values)) as (drawn, panels):
        for axes, (entry, blocks) in zip(panels, values, strict=True):
            style = look(entry)
            axes.bar(list(blocks), [scale * v for v in blocks.values()], 0.8, color=style.colour)
            axes.set_ylim(0, (top or 1.0) * 1.1)
            axes.set_title(style.label, loc="left", fontsize=9, pad=3)
            axes.grid(visible=False, axis="x")
            axes.locator_params(axis="y", nbins=3)
        panels[-1].set_xlabel(words.x)
        drawn.supylabel(words.y, fontsize=10)
        svg, png = render(drawn, words.name, words.title, words.conditions)
    said = [
        f"“{entry.name}”: from {digits(scale * min(blocks.values()))} to {digits(scale * max(blocks.values()))} "
        f"over {len(blocks)} blocks"
        for entry, blocks in values
    ]
    return Figure(
        words.name, words.title, f"{words.y}. " + "; ".join(said) + ".", words.conditions, words.table, svg, png
    )


def history(runs: Sequence[str], lines: Sequence[tuple[Entry, list[Interval | None]]], words: Words) -> Figure | None:
    """A ratio over runs, oldest on the left, a line a candidate with intervals; a gap where it was not measured."""
    lines = [(entry, ratios) for entry, ratios in lines if any(value is not None for value in ratios)]
    if len(runs) < 2 or not lines:
        return None
    with drawing(height=4.0) as (drawn, [axes]):
        handles = []
        for entry, ratios in lines:
            style = look(entry)
            known = [(i, drawable(value)) for i, value in enumerate(ratios) if value is not None]
            spread = [
                [max(v.value - (v.value if v.low is None else v.low), 0.0) for _, v in known],
                [max((v.value if v.high is None else v.high) - v.value, 0.0) for _, v in known],
            ]
            handles.append(
                axes.errorbar(
                    [i for i, _ in known],
                    [v.value for _, v in known],
                    yerr=spread,
                    color=style.colour,
                    marker=style.marker,
                    linestyle=style.dash,
                    capsize=3,
                    elinewidth=1.2,
                )
            )
        axes.axhline(1, color=INK, linewidth=1, zorder=1)
        axes.set_xticks(range(len(runs)), [short(run) for run in runs], rotation=30 if len(runs) > 4 else 0, fontsize=8)
        axes.set_xlim(-0.4, len(runs) - 0.6)
        ends = [end for _, ratios in lines for v in ratios if v is not None for end in (v.low, v.value, v.high)]
        ratio_axis(axes, "y", [end for end in ends if end is not None])
        axes.set(xlabel=words.x, ylabel=words.y)
        legend_below(drawn, handles, [look(entry).label for entry, _ in lines])
        svg, png = render(drawn, words.name, words.title, words.conditions)
    said = [
        f"“{entry.name}”: " + ", ".join(f"{run} {interval(v, '×')}" for run, v in zip(runs, ratios, strict=True))
        for entry, ratios in lines
    ]
    return Figure(words.name, words.title, "; ".join(said) + ".", words.conditions, words.table, svg, png)
