"""The healing study on tiny models: cells once and one by one, what is stopped goes on, tables from the file alone."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from crepe_deploy.bench.assets import Assets
from crepe_deploy.bench.studies import heal, heal_cells
from crepe_deploy.bench.studies.heal_cells import Piece, Start, parse, pieces
from crepe_deploy.bench.studies.heal_table import TASKS, TEXTS

import crepe_deploy
from crepe_deploy.errors import ConfigError
from tests.bench.command import in_this_process
from tests.pico import QUICK_TYR, make_pico_llama, sample_text

CALIBRATION = ("--calib-samples", "2", "--calib-length", "32")
STARTS = {"2:4": Start(("prune", "--method", "ria", "--sparsity", "2:4", *CALIBRATION), 1)}
NARROWING = Start(("tyr", *QUICK_TYR, *CALIBRATION, "--search-samples", "2"), 1)


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Assets:
    """A tiny model and texts in place of the real ones, and starts that are quick."""
    found = Assets(tmp_path)
    make_pico_llama(found.model, torch.bfloat16)
    for seed, name in enumerate(TEXTS):
        found.text(name, "train").write_text(sample_text(3000, seed))
        found.text(name).write_text(sample_text(400, seed + 2))
    (tmp_path / "tasks").mkdir()
    for task in TASKS:
        lines = [
            {"doc_id": number, "label": 0, "request": {"context": "the first of", "continuation": f" {choice}"}}
            for number in range(3)
            for choice in ("two", "years")
        ]
        (tmp_path / "tasks" / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    monkeypatch.setattr(heal, "ensure_assets", lambda _: found)
    monkeypatch.setattr(heal, "crepe_deploy", in_this_process)
    monkeypatch.setattr(heal_cells, "STARTS", STARTS)
    monkeypatch.setattr(heal_cells, "NARROWING", NARROWING)
    monkeypatch.setattr(heal_cells, "STEPS", (0, 10, 20))
    return found


def run(folder: Path, *arguments: str) -> Result:
    fixed = ["--window", "64", "--max-tokens", "256", "--documents", "2", "--folder", str(folder / "work")]
    fixed += ["--out", str(folder / "heal.json")]
    result = CliRunner().invoke(heal.main, [*arguments, *fixed], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def cells(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "heal.json").read_text())["cells"]
    return found


@pytest.mark.usefixtures("assets")
def test_cells_are_measured_one_by_one_and_tabled(tmp_path: Path) -> None:
    run(tmp_path, "--cell", "2:4@0")
    first = cells(tmp_path)
    assert list(first) == ["2:4|0|0"] and [one["what"] for one in first["2:4|0|0"]["runs"]] == ["prune"]
    run(tmp_path, "--cell", "2:4@10")
    row = cells(tmp_path)["2:4|10|0"]
    assert [one["what"] for one in row["runs"]] == ["heal"], "the pruned model is not made again"
    assert row["steps"] == 10 and row["seed"] == 0 and 0 < row["step_cpu_seconds"] < row["cpu_seconds"]
    assert row["environment"]["versions"] and row["environment"]["threads"] and row["environment"]["load"]
    assert row["held_out_kl"]["after"] < row["held_out_kl"]["before"]
    assert [path.name for path in (tmp_path / "work").iterdir() if path.name[0] != "."] == ["2-4-0-0"]
    again = run(tmp_path, "--cell", "2:4@0", "--cell", "2:4@10", "--list", "--render", str(tmp_path / "heal.md"))
    assert again.stderr.count("measured before") == 2 and cells(tmp_path)["2:4|10|0"] == row
    assert re.search(r"^2:4@0 +seed 0 .*done: wiki \d", again.stdout, re.MULTILINE)
    assert re.search(r"^2:4@20 +seed 0 .* CPU-minutes.*left$", again.stdout, re.MULTILINE)
    page = (tmp_path / "heal.md").read_text()
    assert "| 2:4 | 0 | 0 | 0.0 | 0.0 |" in page and "| 2:4 | 10 | 0 |" in page
    assert str(tmp_path) not in (tmp_path / "heal.json").read_text() + page


@pytest.mark.usefixtures("assets")
def test_the_second_model_is_healed_towards_itself(tmp_path: Path) -> None:
    run(tmp_path, "--cell", "narrowed/2:4@10", "--render", str(tmp_path / "heal.md"))
    row = cells(tmp_path)["narrowed/2:4|10|0"]
    assert [one["what"] for one in row["runs"]] == ["prune", "heal"]
    page = (tmp_path / "heal.md").read_text()
    assert "The second model" in page and "| 2:4 | 10 | 0 |" in page and "## SmolLM2\n" not in page


def test_a_stopped_cell_goes_on_to_the_same_numbers(tmp_path: Path, assets: Assets) -> None:
    run(tmp_path, "--cell", "2:4@0", "--cell", "2:4@20")
    whole = cells(tmp_path).pop("2:4|20|0")
    pruned, out = tmp_path / "work" / "2-4-0-0", tmp_path / "work" / "2-4-20-0"

    shutil.rmtree(out)

    class Stopped(RuntimeError):
        """What a stop raises."""

    def stop(done: int, total: int) -> None:
        if done == 14:
            raise Stopped

    texts = [assets.text(name, "train") for name in TEXTS]
    with pytest.raises(Stopped):
        crepe_deploy.heal(pruned, out, dense=assets.model, text=texts, steps=20, show=lambda _: nullcontext(stop))
    (tmp_path / "heal.json").unlink()
    assert re.search(r"^2:4@20 .* begun$", run(tmp_path, "--list").stdout, re.MULTILINE)
    listed = run(tmp_path, "--cell", "2:4@20", "--list").stdout
    assert re.search(r"^2:4@20 .* done: wiki .* behind a stop\)$", listed, re.MULTILINE)
    row = cells(tmp_path)["2:4|20|0"]
    assert [(one["what"], one["went_on"]) for one in row["runs"]] == [("heal", True)]
    assert row["perplexity"] == whole["perplexity"] and row["held_out_kl"] == whole["held_out_kl"]


@pytest.mark.usefixtures("assets")
def test_zero_shot_is_a_cell_of_its_own(tmp_path: Path) -> None:
    result = CliRunner().invoke(heal.main, ["--cell", "zero-shot/2:4@0"])
    assert result.exit_code == 2 and "need --tasks" in result.stderr
    tasks = str(tmp_path / "tasks")
    run(tmp_path, "--cell", "zero-shot/2:4@0", "--tasks", tasks, "--render", str(tmp_path / "heal.md"))
    row = cells(tmp_path)["zero-shot/2:4|0|0"]
    assert list(row["tasks"]) == list(TASKS) and [one["what"] for one in row["runs"]] == ["prune"]
    mean = sum(row["tasks"][task]["acc"]["value"] for task in TASKS) / len(TASKS)
    page = (tmp_path / "heal.md").read_text()
    assert f"| 2:4 | 0 | 0 | {row['tasks']['arc_easy']['acc']['value']:.3f} |" in page and f"| {mean:.3f} |" in page
    assert page.count("| dense |") == 1 and str(tmp_path) not in (tmp_path / "heal.json").read_text()


def test_names_of_cells() -> None:
    assert all(parse(piece.name) == piece for piece in pieces())
    assert parse("zero-shot/tyr25@7") == Piece("zero-shot", "tyr25", 7)
    for wrong in ("16:32", "16:31@0", "16:32@x", "wide/2:4@0"):
        with pytest.raises(ConfigError, match=r"cell .* is unknown; known: 16:32@0"):
            parse(wrong)
