"""What a report is made of, before any HTML or Markdown: tables, figures, sections, chapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .advice import Advice

from ..run.result import Interval
from .numbers import MISSING, interval, percent, si

FOLDED_FROM_ROWS: Final = 30


@dataclass(frozen=True)
class Cell:
    """A table cell: what is shown, and what it is sorted by (the text itself where `value` is None)."""

    text: str
    value: float | None = None

    @property
    def empty(self) -> bool:
        return self.text == MISSING


@dataclass(frozen=True)
class Table:
    """A table. The first column names the row. `conditions`: under which its numbers hold."""

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    conditions: str = ""
    always_folded: bool = False

    @property
    def folded(self) -> bool:
        """Whether readers open it first: long tables are."""
        return self.always_folded or len(self.rows) > FOLDED_FROM_ROWS


@dataclass(frozen=True)
class Figure:
    """A drawn figure: SVG for the page, PNG for the folder, words for who sees neither, the table with its numbers."""

    name: str
    title: str
    alternative: str
    conditions: str
    table: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, figures and tables; `missing` says why there is nothing else."""

    name: str
    title: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Chapter:
    """All about one scenario on one machine."""

    name: str
    title: str
    facts: tuple[str, ...]
    advice: Advice
    summary: Table
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Report:
    """The whole report."""

    title: str
    notes: tuple[str, ...]
    chapters: tuple[Chapter, ...]
    version: str


def cell(text: str) -> Cell:
    """A cell of words; line ends become spaces."""
    return Cell(" ".join(text.split()) or MISSING)


def quantity(value: float | None, unit: str) -> Cell:
    """A cell with a quantity and its unit."""
    return Cell(si(value, unit), value)


def fraction(value: float | None) -> Cell:
    """A cell with a percentage."""
    return Cell(percent(value), value)


def estimate(figure: Interval | None, suffix: str = "") -> Cell:
    """A cell with a figure and its interval."""
    return Cell(interval(figure, suffix), None if figure is None else figure.value)


def is_numeric(table: Table, column: int) -> bool:
    """Whether every known cell of a column carries a number, and at least one does."""
    cells = [row[column] for row in table.rows if not row[column].empty]
    return bool(cells) and all(own.value is not None for own in cells)


def without_empty_columns(table: Table) -> Table:
    """The table without the columns in which nothing is known; the first column stays."""
    keep = [0] + [i for i in range(1, len(table.columns)) if any(not row[i].empty for row in table.rows)]
    return Table(
        table.name,
        table.caption,
        tuple(table.columns[i] for i in keep),
        tuple(tuple(row[i] for i in keep) for row in table.rows),
        table.conditions,
        table.always_folded,
    )
