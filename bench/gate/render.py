"""A verdict for people and machines: the terminal, JSON, JUnit XML, and a Markdown comment, all of the same object."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...store.files import write_text
from ...store.folders import held
from ..run.metrics import METRICS
from .verdict import Row, Status, Verdict

if TYPE_CHECKING:
    from rich.console import RenderableType

STYLES: Final[dict[Status, str]] = {
    "PASS": "green",
    "FAIL": "bold red",
    "INCONCLUSIVE": "yellow",
    "INVALID": "bold magenta",
}
SIGNS: Final[dict[Status, str]] = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "❔", "INVALID": "⛔"}
COLUMNS: Final = ("candidate", "check", "where", "baseline", "measured", "found", "limit", "reason")
_MARKDOWN: Final = str.maketrans(
    {mark: f"\\{mark}" for mark in "\\|*_[]#~"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "@\u200b", "`": "'"}
)
_NOT_IN_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def show(verdict: Verdict, as_json: bool) -> None:
    """Print a verdict on stdout, as a table or as one JSON document."""
    if as_json:
        print(verdict.model_dump_json(indent=2))
        return
    from rich.console import Console

    console = Console()
    wide = console if console.is_terminal else Console(width=200)
    for part in terminal(verdict):
        wide.print(part)


def write(verdict: Verdict, junit_path: Path | None, markdown_path: Path | None) -> None:
    """Write the files that are asked for, each whole or not at all. Raises OutputError, DiskFullError."""
    if junit_path is not None:
        with held(junit_path):
            write_text(junit_path, junit(verdict))
    if markdown_path is not None:
        with held(markdown_path):
            write_text(markdown_path, markdown(verdict))


def headline(verdict: Verdict) -> str:
    """One line: the status, which gate, of what."""
    rows = ", ".join(f"{count} {status}" for status in SIGNS if (count := verdict.count(status)))
    return f"{verdict.status}: {verdict.gate} ({', '.join(verdict.candidates)} against {verdict.baseline}; {rows})"


def terminal(verdict: Verdict) -> list[RenderableType]:
    """A headline, a table and the notes, for a rich console."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    table.add_column("status", no_wrap=True)
    for name in COLUMNS:
        table.add_column(
            name, justify="right" if name in ("baseline", "measured", "limit") else "left", overflow="fold"
        )
    for row in verdict.rows:
        table.add_row(Text(row.status, STYLES[row.status]), *map(Text, cells(row)))
    notes = [Text(f"note: {note}") for note in verdict.notes]
    return [Text(headline(verdict), STYLES[verdict.status]), table, *notes, Text(conditions(verdict))]


def markdown(verdict: Verdict) -> str:
    """A comment for a pull request."""
    lines = [f"### {SIGNS[verdict.status]} {_escape(headline(verdict))}", ""]
    lines += [f"| status | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for row in verdict.rows:
        lines.append(f"| {SIGNS[row.status]} {row.status} | {' | '.join(map(_escape, cells(row)))} |")
    lines += ["", *(f"- {_escape(note)}" for note in verdict.notes), f"- {_escape(conditions(verdict))}"]
    return "\n".join(lines) + "\n"


def junit(verdict: Verdict) -> str:
    """JUnit XML: one test a row; FAIL is a failure, INVALID an error, INCONCLUSIVE is skipped."""
    counts = {
        "tests": len(verdict.rows),
        "failures": verdict.count("FAIL"),
        "errors": verdict.count("INVALID"),
        "skipped": verdict.count("INCONCLUSIVE"),
    }
    attributes = {name: str(count) for name, count in counts.items()} | {"time": "0"}
    root = ElementTree.Element("testsuites", {"name": "crepe-deploy gate"} | attributes)
    suite = ElementTree.SubElement(root, "testsuite", {"name": f"gate: {verdict.gate}"} | attributes)
    for row in verdict.rows:
        _testcase(suite, row, verdict)
    output = ElementTree.SubElement(suite, "system-out")
    output.text = _xml("\n".join([headline(verdict), *verdict.notes, conditions(verdict)]))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of COLUMNS."""
    unit = {"memory": "bytes"}.get(row.check, _unit(row))
    reason = f"{row.reason}; {row.comparison}" if row.comparison else row.reason
    found = "" if row.value is None else f"{_interval(row)} ({_better(row)} is better)"
    limit = "" if row.limit is None else _number(row.limit, row.unit)
    figures = ("" if value is None else _number(value, unit) for value in (row.baseline, row.measured))
    return (row.candidate, row.check, row.place, *figures, found, limit, reason)


def conditions(verdict: Verdict) -> str:
    """What the intervals are."""
    looks = f", each of {verdict.looks} looks" if verdict.looks > 1 else ""
    return (
        f"found: ratios above 1 are worse than the baseline; {verdict.level:.4g} intervals over rounds{looks}; "
        f"a latency fails after Holm's correction"
    )


def _testcase(suite: ElementTree.Element, row: Row, verdict: Verdict) -> None:
    names = {"classname": f"{verdict.gate}.{row.candidate}", "name": f"{row.check}: {row.place}", "time": "0"}
    case = ElementTree.SubElement(suite, "testcase", {key: _xml(value) for key, value in names.items()})
    tag = {"FAIL": "failure", "INVALID": "error", "INCONCLUSIVE": "skipped"}.get(row.status)
    figures = ", ".join(f"{name} {text}" for name, text in zip(COLUMNS[3:7], cells(row)[3:7], strict=True) if text)
    if tag is not None:
        attributes = {"message": _xml(f"{row.status}: {row.reason}")}
        if tag != "skipped":
            attributes["type"] = row.status
        ElementTree.SubElement(case, tag, attributes).text = _xml(figures)
    else:
        ElementTree.SubElement(case, "system-out").text = _xml(f"{figures}, {row.reason}")


def _unit(row: Row) -> str:
    if row.metric.endswith("_per_s"):
        return "tokens/s"
    return "s" if row.check == "latency" else row.unit


def _better(row: Row) -> str:
    """Which way what was found is better: ratios of slow-downs lower, what an objective asks for as its metric."""
    if row.check == "objective" and (metric := METRICS.get(row.metric)) is not None:
        return metric.better
    return "higher" if row.metric == "same_top" else "lower"


def _interval(row: Row) -> str:
    assert row.value is not None
    text = _number(row.value.value, row.unit)
    if row.value.low is None or row.value.high is None:
        return text
    return f"{text} [{_number(row.value.low, '')}, {_number(row.value.high, '')}]"


def _number(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:.4g} MB"
    digits = f"{value:.4g}"
    return digits if unit in ("", "ratio", "share") else f"{digits} {unit}"


def _escape(text: str) -> str:
    """Markdown that cannot leave its table cell, mention or link to anyone, or make HTML."""
    return " ".join(text.split()).translate(_MARKDOWN)


def _xml(text: str) -> str:
    return _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text)
