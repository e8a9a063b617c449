"""From groups of runs to a report: the order of its chapters and sections."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Final

from .advice import MAX_PERPLEXITY_RATIO, advise
from .compare import compare
from .content import Chapter, Report, Section
from .loading import Group
from .numbers import plural
from .quality_section import quality, trade_offs
from .record_section import conditions, failures, history
from .scene import Scene
from .size_section import layers, memory
from .speed_section import differences, latency, load
from .summary import summary_table

SECTIONS: Final[tuple[Callable[[Scene], Section], ...]] = (
    trade_offs, quality, differences, load, latency, memory, layers, history, failures, conditions,
)  # fmt: skip
CONTEXT_TOKENS: Final = 4096


def build_report(groups: Sequence[Group], limit: float = MAX_PERPLEXITY_RATIO, context: int = CONTEXT_TOKENS) -> Report:
    """One chapter for each group; ratios never cross from one to another."""
    notes = []
    if len(groups) > 1:
        notes.append(
            "The runs differ in scenario, machine, threads, workload or baseline. Each kind has a chapter of its own; "
            "do not compare absolute figures across chapters."
        )
    chapters = tuple(
        build_chapter(group, f"{i}-" if len(groups) > 1 else "", limit, context) for i, group in enumerate(groups, 1)
    )
    names = list(dict.fromkeys(chapter.title for chapter in chapters))
    return Report(", ".join(names), tuple(notes), chapters, importlib.metadata.version("crepe-deploy"))


def build_chapter(group: Group, prefix: str, limit: float, context: int) -> Chapter:
    """Everything about the latest run of a group, and the group's history."""
    run = group.latest
    scene = Scene(prefix, group, compare(run), context)
    facts = (
        f"{plural(len(run.candidates), 'candidate')} against “{run.baseline}”",
        scene.machine,
        f"taken {run.created}" + (f", latest of {plural(len(group.sources), 'run')}" if len(group.sources) > 1 else ""),
    )
    return Chapter(
        scene.name("chapter"),
        run.name,
        facts,
        advise(scene.comparison, limit),
        summary_table(scene),
        tuple(section(scene) for section in SECTIONS),
    )
