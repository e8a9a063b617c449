"""The report in Markdown, for pull requests and terminals: answer, tables and links to the PNG figures."""

from __future__ import annotations

import re

from .content import Chapter, Report, Section, Table, is_numeric

_SPECIAL = re.compile(r"([\\`*_\[\]|#~])")


def markdown(report: Report) -> str:
    """The whole report but the rows of long tables, which the page has."""
    lines = ["# Benchmark report", ""]
    for note in report.notes:
        lines += [escape(note), ""]
    for chapter in report.chapters:
        lines += _chapter(chapter)
    lines += [f"Made by crepe-deploy {escape(report.version)} report. The page `report.html` beside it has everything."]
    return "\n".join(lines) + "\n"


def _chapter(chapter: Chapter) -> list[str]:
    lines = [f"## {escape(chapter.title)}", "", escape("; ".join(chapter.facts)), ""]
    lines += [f"**Should I prune, quantise, or both? {escape(chapter.advice.headline)}**", ""]
    lines += [f"- {escape(reason)}" for reason in chapter.advice.reasons]
    lines += ["", *table_lines(chapter.summary), "", "The answer follows from these rules:", ""]
    lines += [f"{i}. {escape(rule)}" for i, rule in enumerate(chapter.advice.rules, 1)]
    lines.append("")
    for section in chapter.sections:
        lines += _section(section)
    return lines


def _section(section: Section) -> list[str]:
    lines = [f"### {escape(section.title)}", ""]
    if section.missing is not None:
        return [*lines, escape(section.missing), ""]
    for paragraph in section.text:
        lines += [escape(paragraph), ""]
    for figure in section.figures:
        lines += [f"![{escape(figure.title)}. {escape(figure.alternative)}](figures/{figure.name}.png)", ""]
        lines += [f"*{escape(figure.title)}. {escape(figure.conditions)}*", ""]
    for table in section.tables:
        if table.folded:
            lines += [f"{escape(table.caption)}: {len(table.rows)} rows, in the page.", ""]
        else:
            lines += [*table_lines(table), ""]
    return lines


def table_lines(table: Table) -> list[str]:
    """A GitHub table with its caption above and its conditions below."""
    rule = ["---:" if is_numeric(table, i) else "---" for i in range(len(table.columns))]
    lines = [f"**{escape(table.caption)}**", "", _row([escape(column) for column in table.columns]), _row(rule)]
    lines += [_row([escape(own.text) for own in row]) for row in table.rows]
    return [*lines, "", f"*{escape(table.conditions)}*"] if table.conditions else lines


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escape(text: str) -> str:
    """Text that Markdown and the HTML inside it take literally, on one line."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", flat)
