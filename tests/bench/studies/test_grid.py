"""A results file: what is measured once, what resumes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from crepe_deploy.bench.studies.frame import publish
from crepe_deploy.bench.studies.grid import ResultsFile, cells_of, text_record

from crepe_deploy.errors import ConfigError

CONDITIONS = {"model": "m", "samples": 2}


def test_a_cell_is_measured_once_and_a_stopped_grid_goes_on(tmp_path: Path) -> None:
    path, measured = tmp_path / "new" / "grid.json", []

    def measure(value: int) -> dict[str, int]:
        measured.append(value)
        return {"value": value, "seconds": 3}

    first = ResultsFile(path, CONDITIONS, "first", environment="here")
    first.once("dense", lambda: measure(0))
    assert first.cell("row", 0.5, 1, lambda: measure(1)) == ({"value": 1, "seconds": 3}, "3 s")
    second = ResultsFile(path, CONDITIONS, "second", environment="elsewhere")
    second.once("dense", lambda: measure(10))
    assert second.cell("row", 0.5, 1, lambda: measure(11)) == ({"value": 1, "seconds": 3}, "measured before")
    assert second.find("row", 0.5, 2) is None
    second.cell("row", 0.5, 2, lambda: measure(2))
    assert measured == [0, 1, 2]
    content = json.loads(path.read_text())
    assert list(content) == ["conditions", "versions", "commands", "cells", "environment", "dense"]
    assert content["commands"] == ["first", "second"] and content["environment"] == "here"
    assert list(content["cells"]) == ["row|0.5|1", "row|0.5|2"]


def test_a_cell_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = ResultsFile(tmp_path / "grid.json", CONDITIONS, "x")
    file.cell("a", "2:4", 0, lambda: {"seconds": 1})
    before = file.path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        file.cell("b", "2:4", 0, lambda: {"seconds": 1 / 0})
    assert file.path.read_bytes() == before and file.find("b", "2:4", 0) is None


def test_what_another_run_added_meanwhile_stays(tmp_path: Path) -> None:
    ours, theirs = (ResultsFile(tmp_path / "grid.json", CONDITIONS, name) for name in ("ours", "theirs"))
    theirs.once("dense", lambda: 1)
    theirs.cell("a", 10, 0, lambda: {"seconds": 1})
    ours.cell("a", 20, 0, lambda: {"seconds": 2})
    content = json.loads(ours.path.read_text())
    assert list(content["cells"]) == ["a|10|0", "a|20|0"] and content["dense"] == 1
    assert content["commands"] == ["theirs", "ours"]


def test_other_conditions_are_refused_and_texts_are_told_by_their_hash(tmp_path: Path) -> None:
    (tmp_path / "calib.txt").write_text("one")
    conditions = {"calibration": text_record(tmp_path / "calib.txt")}
    ResultsFile(tmp_path / "grid.json", conditions, "x").once("dense", lambda: 1)
    (tmp_path / "calib.txt").write_text("two")
    with pytest.raises(ConfigError, match=r"other conditions \(calibration: .*there, .*here\)"):
        ResultsFile(tmp_path / "grid.json", {"calibration": text_record(tmp_path / "calib.txt")}, "x")
    assert text_record(tmp_path / "calib.txt", "file")["file"] == "calib.txt"


def test_cells_come_place_by_place_and_seed_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = list(cells_of(("a", "ab", "b"), "^a", "x,y", "0,2"))
    assert cells == [(label, at, seed) for at in "xy" for seed in (0, 2) for label in ("a", "ab")]
    publish("page\n", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == "page\n" and "page" in capsys.readouterr().out
