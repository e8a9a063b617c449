"""Run files in, report folder out: whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ...errors import ConfigError
from ...extras import require
from ...store.files import disk_errors
from ...store.folders import atomic_folder, check_output, held
from .advice import MAX_PERPLEXITY_RATIO
from .chapters import CONTEXT_TOKENS, build_report
from .content import Report
from .loading import load_groups
from .markdown import markdown
from .page import page

PAGE: Final = "report.html"
SUMMARY: Final = "report.md"
FIGURES: Final = "figures"
OWN = (PAGE, SUMMARY, f"{FIGURES}/*.png")  # what a report is made of


def make_report(
    paths: Sequence[Path],
    out: Path,
    *,
    max_perplexity_ratio: float = MAX_PERPLEXITY_RATIO,
    context_tokens: int = CONTEXT_TOKENS,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write OUT/report.html, OUT/report.md and OUT/figures/*.png from run files; returns what was written and answered.

    Raises ConfigError for unusable run files, OutputError for an unusable `out`, MissingExtra without matplotlib.
    """
    if not paths:
        raise ConfigError("no run file given: name at least one RUN.json that `crepe-deploy bench` wrote")
    require("the report", "jinja2", "matplotlib")
    out = out.absolute()
    check_output(out, overwrite=overwrite, inputs=tuple(paths), own=OWN)
    with held(out):
        report = build_report(load_groups(paths), max_perplexity_ratio, context_tokens)
        with atomic_folder(out, overwrite=overwrite, own=OWN) as partial, disk_errors(out):
            files = _write(report, partial)
    return {
        "report": str(out / PAGE),
        "files": files,
        "chapters": [
            {
                "scenario": chapter.title,
                "answer": chapter.advice.answer,
                "chosen": chapter.advice.chosen,
                "headline": chapter.advice.headline,
                "reasons": list(chapter.advice.reasons),
            }
            for chapter in report.chapters
        ],
    }


def _write(report: Report, folder: Path) -> list[str]:
    (folder / FIGURES).mkdir()
    (folder / PAGE).write_text(page(report), encoding="utf-8")
    (folder / SUMMARY).write_text(markdown(report), encoding="utf-8")
    for chapter in report.chapters:
        for section in chapter.sections:
            for figure in section.figures:
                (folder / FIGURES / f"{figure.name}.png").write_bytes(figure.png)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
