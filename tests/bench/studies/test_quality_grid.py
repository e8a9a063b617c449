"""The quality grid on a tiny model: cells that resume, conditions that are held to, and the numbers of its table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from crepe_deploy.bench.studies.quality_grid import ROWS, main, row_config
from crepe_deploy.bench.studies.quality_table import base_of, closed, interval, markdown

from crepe_deploy.errors import ConfigError, CrepeError
from crepe_deploy.quality.perplexity import evaluate
from tests.pico import make_pico_llama, sample_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grid")
    make_pico_llama(root / "m")
    for index, name in enumerate(("calib", "a", "b")):
        (root / f"{name}.txt").write_text(sample_text(2000, seed=index), encoding="utf-8")
    return root


def run(folder: Path, out: Path, *options: str) -> Result:
    texts = [part for name in ("a", "b") for part in ("--text", f"{name}={folder / name}.txt")]
    sizes = ["--samples", "4", "--length", "32", "--window", "32", "--windows", "5", "--seeds", "0,1"]
    fixed = ["--model", str(folder / "m"), "--calib", str(folder / "calib.txt"), "--patterns", "2:4", "--out", str(out)]
    return CliRunner().invoke(main, [*fixed, *texts, *sizes, *options], catch_exceptions=True)


def test_cells_resume_and_the_table_holds_their_numbers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.json"
    assert run(folder, out, "--rows", "^RIA$").exit_code == 0
    first = json.loads(out.read_text())
    assert set(first["cells"]) == {"RIA|2:4|0", "RIA|2:4|1"}
    result = run(folder, out, "--rows", "^(RIA|Wanda|RIA [+] exact)$", "--markdown", str(tmp_path / "q.md"))
    assert result.exit_code == 0
    assert result.output.count("measured before") == 2
    second = json.loads(out.read_text())
    assert {key: second["cells"][key] for key in first["cells"]} == first["cells"]
    assert len(second["cells"]) == 6
    losses = np.mean([second["cells"][f"Wanda|2:4|{seed}"]["losses"]["a"] for seed in (0, 1)], axis=0)
    assert losses.shape == (5,)
    table = (tmp_path / "q.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| Wanda"))
    assert f"| {np.exp(losses.mean()):.1f} |" in row
    assert [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| RIA ")] == ["0, 1", "0, 1"]


def test_its_losses_are_those_of_eval(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "q.json", "--rows", "^RIA$")
    dense = json.loads((tmp_path / "q.json").read_text())["dense"]["a"]
    report = evaluate(folder / "m", folder / "a.txt", window=32, max_tokens=160, bos="none")
    assert np.exp(np.mean(dense)) == pytest.approx(report.perplexity.value, rel=1e-5)


def test_several_calibration_texts_are_mixed_and_named(folder: Path, tmp_path: Path) -> None:
    (folder / "more.txt").write_text(sample_text(2000, seed=9), encoding="utf-8")
    out = tmp_path / "q.json"
    options = ("--rows", "^RIA$", "--seeds", "0", "--calib", str(folder / "more.txt"))
    assert run(folder, out, *options, "--markdown", str(tmp_path / "q.md")).exit_code == 0
    assert "tokens of calib.txt + more.txt, equal shares" in (tmp_path / "q.md").read_text()
    assert "--calib calib.txt --calib more.txt" in json.loads(out.read_text())["commands"][0]
    assert isinstance(run(folder, out, "--rows", "^RIA$", "--seeds", "0").exception, ConfigError)


def test_other_conditions_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.json"
    run(folder, out, "--rows", "^RIA$")
    before = out.read_text()
    result = run(folder, out, "--rows", "^RIA$", "--samples", "5")
    assert isinstance(result.exception, ConfigError)
    assert "other conditions" in str(result.exception)
    assert out.read_text() == before


def test_a_step_without_meaning_for_a_pattern_is_left_out_loudly(folder: Path, tmp_path: Path) -> None:
    result = run(folder, tmp_path / "q.json", "--rows", "fold$", "--patterns", "0.5/row")
    assert result.exit_code == 0
    assert "RIA + fold 0.5/row: left out: --permute changes nothing" in result.output


def test_a_peer_needs_its_own_python_and_says_how_it_failed(folder: Path, tmp_path: Path) -> None:
    rows = ["--rows", "^llm-compressor"]
    result = run(folder, tmp_path / "q.json", *rows)
    assert result.exit_code == 0
    assert "left out: it runs in an environment of its own: give --peer PYTHON" in result.output
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    broken.chmod(0o755)
    result = run(folder, tmp_path / "q.json", *rows, "--peer", str(broken))
    assert isinstance(result.exception, CrepeError)
    assert "ended with exit code 3: no such module" in str(result.exception)
    assert not json.loads((tmp_path / "q.json").read_text())["cells"]


@pytest.mark.parametrize("label", [label for label in ROWS if "peer" not in ROWS[label]])
def test_every_row_is_a_configuration(label: str) -> None:
    assert str(row_config(ROWS[label], "16:32").pattern) == "16:32"


def test_the_statistics_of_the_table() -> None:
    assert closed(loss=2.0, base=3.0, dense=1.0) == 0.5
    low, high = interval(np.full(8, np.log(2.0)))
    assert low == pytest.approx(2.0)
    assert high == pytest.approx(2.0)
    wide = interval(np.random.default_rng(0).normal(0, 1, 40))
    assert wide[0] < 1 < wide[1]
    conditions = {"model": "m", "samples": 1, "length": 2, "calibration": {"text": "c"}, "windows": 2, "window": 2}
    result = {
        "commands": ["python -m x"],
        "conditions": {**conditions, "texts": {"t": {}}},
        "dense": {"t": [1.0, 1.0]},
        "cells": {
            "RIA|2:4|0": {"losses": {"t": [3.0, 3.0]}, "seconds": 1.0},
            "x|2:4|0": {"losses": {"t": [2.0, 2.0]}, "seconds": 2.0},
        },
    }
    assert "| x | 0 | 7.4 | 0.368 [0.368, 0.368] | 50% | 2 |" in markdown(result)


def test_a_row_with_its_own_windows_is_compared_with_ria_on_as_many() -> None:
    assert base_of("recipe best") == base_of("RIA, a = 1") == "RIA"
    assert base_of("recipe best, 256 windows") == "RIA, 256 windows"
    assert all(base_of(label) in ROWS for label in ROWS)
    config = row_config(ROWS["RIA, 256 windows"], "2:4")
    assert config == row_config(ROWS["RIA"], "2:4")
