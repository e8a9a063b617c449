"""Every column of measured figures says which direction is better, everywhere in the same words."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from crepe_deploy.bench.gate import render
from crepe_deploy.bench.gate.gates import gate_pruned
from crepe_deploy.bench.report.write import make_report
from crepe_deploy.bench.run.result import save_run
from crepe_deploy.bench.run.summary import summary_lines
from crepe_deploy.bench.studies import quality_table, structural_table

from crepe_deploy.cli import run
from tests.bench.gate.gating import budgets
from tests.bench.report_runs import charted
from tests.pico import make_pico_llama, sample_text

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.md"), *ROOT.glob("*.md")])
SAYS: Final = re.compile(r"\b(lower|higher) is better\b")
ELSE: Final = re.compile(r"\b(less|fewer|smaller|shorter|more|larger|bigger|faster) (is|are) better\b", re.IGNORECASE)
MEASURED: Final = re.compile(r"\b(perplexity|KL|layer error|over dense|same top|most likely)\b")
FIGURE: Final = re.compile(r"[*~]*-?\d[\d,.]*(e-?\d+)?(%|x|×)?[*]*(?=$|[\s\[(;])")
RULE: Final = re.compile(r"\|?[\s:|-]*-[\s:|-]*\|[\s:|-]*")


def tables(text: str) -> Iterator[list[list[str]]]:
    """The tables of a page of Markdown, each its rows of cells, the header first."""
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if index and RULE.fullmatch(line.strip()) and "|" in lines[index - 1]:
            below = lines[index + 1 :]
            end = next((at for at, row in enumerate(below) if not row.lstrip().startswith("|")), len(below))
            caption = lines[index - 3] if index > 2 and lines[index - 3].startswith("**") else ""
            head, *rows = [_cells(row) for row in [lines[index - 1], *below[:end]]]
            yield [[f"{head[0]} {caption}".strip(), *head[1:]], *rows]


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


NEITHER: Final = {  # columns of figures that no direction is better of, or whose table is of counts
    "seeds", "steps", "parameters left", "zeros counted", "its own files", "exit", "exit code", "code",
    "windows", "pattern", "Samples", "Rounds", "Convention", "Point", "At once",
    "Requests", "Candidate", "Run", "Model sha256", "removed",
}  # fmt: skip
COUNTS: Final = {  # tables of counts: the first cell of their header
    "inputs by kind", "inputs by command", "exit codes", "reader called alone", "faults by kind", "faults by command",
    "exit codes after a fault (-9: SIGKILL itself)",
}  # fmt: skip


def silent(table: list[list[str]]) -> list[str]:
    """Columns of figures that do not say which direction is better: in their own header, in the first cell where
    the table is of one measure, in its caption, or in every row."""
    head, rows = table[0], table[1:]
    if head[0] in COUNTS or SAYS.search(head[0]) or (rows and all(SAYS.search(" ".join(row)) for row in rows)):
        return []
    found = []
    for index, name in enumerate(head):
        column = [row[index] for row in rows if index < len(row) and row[index]]
        figures = sum(FIGURE.match(cell) is not None for cell in column)
        if column and 2 * figures >= len(column) and not SAYS.search(name) and name not in NEITHER:
            found.append(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_table_of_the_pages_says_it(page: Path) -> None:
    text = page.read_text()
    assert [name for table in tables(text) for name in silent(table)] == []
    assert ELSE.findall(text) == [], "say it as everywhere: (lower is better), (higher is better)"


def test_no_program_says_it_in_other_words() -> None:
    folders = ("crepe_deploy", "export", "serve", "bench")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        assert ELSE.findall(path.read_text()) == [], path


def test_what_is_silent_is_found() -> None:
    page = "| | PPL | seeds |\n|---|---|---|\n| a | 1.5 | 0 |\n"
    assert [silent(table) for table in tables(page)] == [["PPL"]]
    assert [silent(table) for table in tables(page.replace("PPL", "PPL (lower is better)"))] == [[]]


@pytest.mark.parametrize("name", ["quality", "quality-mixture", "quality-narrowed"])
def test_the_pages_of_the_quality_grid_are_as_its_program_writes_them(name: str) -> None:
    result = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    written = {line for line in quality_table.markdown(result).splitlines() if line.startswith("| ")}
    page = [line for line in (ROOT / "docs" / f"{name}.md").read_text().splitlines() if line.startswith("| ")]
    assert set(page) <= written


def test_structural_too() -> None:
    result = json.loads((ROOT / "bench" / "results" / "structural.json").read_text())
    for written in tables(structural_table.markdown(result)):
        assert silent(written) == []


def test_reports_say_it(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.json" for index in range(2)]
    for index, path in enumerate(paths):
        save_run(charted(index), path)
    make_report(paths, tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert [name for table in tables(page) for name in silent(table)] == []


def test_bench_and_gate_say_it_at_the_terminal() -> None:
    measured = charted()
    lines = summary_lines(measured)
    heads = [above for above, line in itertools.pairwise(lines) if line.startswith("  ") and not above.startswith("  ")]
    assert heads and [head for head in heads if not SAYS.search(head)] == []
    assert sum(SAYS.search(line) is not None for line in lines) > 5
    limits = budgets(
        relative=[{"metric": "tpot_s", "max_slowdown": 0.05}], quality={"same_top": 0.5, "kl_mean": 2.0},
        objectives=[{"metric": "output_tokens_per_s", "min": 1.0}],
    )  # fmt: skip
    name = measured.candidates[1].name
    (table,) = tables(render.markdown(gate_pruned(measured, [name], limits)))
    shown = [row[6] for row in table[1:] if row[6]]
    assert len(shown) >= 3 and all(SAYS.search(cell) for cell in shown)


def test_commands_and_cards_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text, out = make_pico_llama(tmp_path / "m"), tmp_path / "text.txt", tmp_path / "out"
    text.write_text(sample_text(2000))
    calibration = ["--calib", str(text), "--calib-samples", "8", "--calib-length", "32"]
    steps = ["--reconstruct", "exact", "--feed", "both", "--rescale", "logits", "--format", "dense"]
    assert run(["prune-and-export", str(model), "--out", str(out), *calibration, *steps]) == 0
    judged = ["--text", str(text), "--window", "32", "--max-tokens", "256", "--against", str(model)]
    assert run(["eval", str(out / "dense"), *judged, "--update-card"]) == 0
    shown = [*capsys.readouterr().out.splitlines(), *(out / "dense" / "README.md").read_text().splitlines()]
    measured = [line for line in shown if MEASURED.search(line) and not line.startswith(("convention", "Compared"))]
    assert len(measured) > 12 and [line for line in measured if not SAYS.search(line)] == []
