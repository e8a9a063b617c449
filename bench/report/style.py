"""How figures look: one colour, marker, dash and hatch a candidate, everywhere; SVG whose colours follow the page.

Drawn with matplotlib's object interface, so no display and no global state is needed. In the SVG each colour of the
palette becomes a CSS variable and ink becomes `currentColor`; the PNG keeps the light palette on white.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ...extras import require
from ..run.result import Interval
from .compare import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

INK: Final = "#1f2328"
GRID: Final = "#d0d7de"
BAND: Final = "#e6eaef"
# Distinct for the common kinds of colour blindness and at least 3:1 against white; the page has a pair for dark mode.
LIGHT: Final = ("#0072b2", "#c44e00", "#007f5f", "#aa3377", "#8a6d00", "#4b4eac")
DARK: Final = ("#58b2f0", "#ff9a52", "#3ccb9f", "#f083b5", "#e3c64a", "#a9abff")
_MARKERS: Final = "os^Dv<PX>"
_DASHES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_HATCHES: Final = ("", "///", "\\\\\\", "xxx", "...", "++", "ooo")
_LABEL_LENGTH: Final = 26
_CAPTION_WIDTH: Final = 64
_CAPTION_LINES: Final = 12
_ROOMY_LINES: Final = 6  # of a caption, or rows of a legend, that a figure has room for as it is
_LINE: Final = 0.18  # inches
_RATIOS: Final = (1e-9, 1e9)  # what an axis of them reaches at most
_SETTINGS: Final[Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "crepe-deploy",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.8,
}


@dataclass(frozen=True)
class Look:
    """How a candidate is drawn."""

    colour: str
    marker: str
    dash: Any
    hatch: str
    label: str


def look(entry: Entry) -> Look:
    """A candidate's look, from its place in the run; the baseline is ink."""
    i = entry.index
    colour = INK if entry.baseline else LIGHT[(i - 1) % len(LIGHT)]
    label = short(entry.name) + (" (baseline)" if entry.baseline else "")
    return Look(colour, _MARKERS[i % len(_MARKERS)], _DASHES[i % len(_DASHES)], _HATCHES[i % len(_HATCHES)], label)


def short(name: str) -> str:
    """A name that fits beside a chart. The leading space keeps matplotlib from dropping a name that starts with _."""
    flat = " ".join("".join(char if char.isprintable() else " " for char in name).split())
    flat = flat if len(flat) <= _LABEL_LENGTH else flat[: _LABEL_LENGTH - 1] + "…"
    return f" {flat}" if flat.startswith("_") else flat


@contextmanager
def drawing(width: float = 4.8, height: float = 3.4, rows: int = 1) -> Iterator[tuple[Drawing, list[Axes]]]:
    """A figure in inches with `rows` panels that share the x axis. Raises MissingExtra without matplotlib."""
    require("the report", "matplotlib")
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing

    with rc_context(_SETTINGS), warnings.catch_warnings():
        # A name may hold characters that the PNG's font lacks; the page's browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        drawn = Drawing(figsize=(width, height), layout="constrained")
        yield drawn, list(drawn.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])


def legend_below(drawn: Drawing, handles: list[Any], labels: list[str]) -> None:
    """A legend outside the axes, where it covers nothing."""
    columns = 1 if max(map(len, labels)) > 24 else 2
    _make_room(drawn, -(-len(labels) // columns))
    drawn.legend(handles, labels, loc="outside lower center", ncols=columns)


def _make_room(drawn: Drawing, lines: int) -> None:
    """Make a figure higher where so many lines of text would leave its axes none."""
    drawn.set_figheight(drawn.get_figheight() + _LINE * max(lines - _ROOMY_LINES, 0))


def log_axis(axes: Axes) -> None:
    """A logarithmic x axis labelled with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def ratio_axis(axes: Axes, which: str, values: list[float]) -> None:
    """An axis of ratios that always shows 1: linear for small ranges, logarithmic for large ones."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = max(min([1.0, *values]), _RATIOS[0]), min(max([1.0, *values]), _RATIOS[1])
    axis = axes.xaxis if which == "x" else axes.yaxis
    limits = axes.set_xlim if which == "x" else axes.set_ylim
    if high / low <= 4:
        margin = max((high - low) * 0.08, 0.02)
        limits(low - margin, high + margin)
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    else:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        limits(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
        axis.set_major_locator(FixedLocator(_round_ticks(low, high)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))


def drawable(ratio: Interval) -> Interval:
    """A ratio as it is drawn: what lies far outside any axis is moved to where matplotlib can still compute."""

    def moved(end: float) -> float:
        return min(max(end, _RATIOS[0] / 10), _RATIOS[1] * 10)

    low, high = (None if end is None else moved(end) for end in (ratio.low, ratio.high))
    return Interval(value=moved(ratio.value), low=low, high=high)


def _round_ticks(low: float, high: float) -> list[float]:
    steps = (1, 2, 5) if high / low < 200 else (1,)
    ticks = [digit * 10.0**power for power in range(-9, 10) for digit in steps]
    return [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]


def render(drawn: Drawing, name: str, title: str, conditions: str) -> tuple[str, bytes]:
    """The figure as an inline SVG element and as PNG bytes, the same every time.

    The PNG travels alone, so it carries its title and conditions; the page writes them beside the SVG.
    """
    svg, png = io.StringIO(), io.BytesIO()
    # Without a title, creator and date matplotlib writes no metadata that could change or leak.
    drawn.savefig(svg, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    told = [*textwrap.wrap(title, _CAPTION_WIDTH), *textwrap.wrap(" ".join(conditions.split()), _CAPTION_WIDTH)]
    told = told if len(told) <= _CAPTION_LINES else [*told[: _CAPTION_LINES - 1], "…"]
    _make_room(drawn, len(told))
    drawn.suptitle("\n".join(told), fontsize=9)
    drawn.savefig(png, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return inline(svg.getvalue(), name), png.getvalue()


def inline(svg: str, name: str) -> str:
    """An SVG document as an element for a page: ids made unique with `name`, colours made to follow the page."""
    element = svg[svg.index("<svg") :].strip()
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    head, rest = element.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    if box is None:
        raise AssertionError("matplotlib wrote an SVG without a viewBox")
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(xlink:href|href)="#', f'href="#{name}-', rest).replace("url(#", f"url(#{name}-")
    for colour, variable in _variables():
        rest = re.sub(f"(?<=: ){colour}", variable, rest)
    return f'<svg {box[0]} aria-hidden="true" focusable="false">{rest}'


def _variables() -> list[tuple[str, str]]:
    named = [(INK, "currentColor"), (GRID, "var(--grid)"), (BAND, "var(--band)")]
    return named + [(colour, f"var(--c{i})") for i, colour in enumerate(LIGHT)]
