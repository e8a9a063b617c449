"""The GPU measurement, rehearsed on the CPU: every stage runs, resumes, and the page says what the results say."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crepe_deploy.bench.gpu import command, table

from crepe_deploy.errors import ConfigError

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def rehearse(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the script as on a bare machine: by its path, from anywhere."""
    script = [sys.executable, str(ROOT / "bench" / "gpu" / "run.py"), "--rehearse", "--out", str(out), *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(script, capture_output=True, text=True, check=False, cwd=out.parent, env=env)


def test_every_stage_is_rehearsed_and_resumed(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    early = rehearse(out, "--stage", "layers")
    assert (early.returncode, "run --stage machine first" in early.stderr) == (2, True)
    stopped = rehearse(out, "--stage", "machine", "--minutes", "-1")
    assert stopped.returncode == 75
    assert not out.exists()
    done = rehearse(out)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(out.read_text())
    rows = [row for unit in results["layers"].values() for row in unit]
    assert {(row["pattern"], row["batch"]) for row in rows} == {(p, b) for p in ("2:4", "16:32") for b in (1, 16)}
    assert all(row["correct"] and row["us"]["packed"]["median"] > 0 and "own dense" in row["us"] for row in rows)
    assert set(results["model"]) == {"dense", "2:4"}
    assert set(results["prune"]) == {"crepe", "best"}
    for row in results["prune"].values():  # the rehearsal's device is the CPU
        assert row["correct"]
        assert set(row["masks"].values()) == {1.0}
        assert row["device"]["seconds_a_block"] > 0
    again = rehearse(out)
    assert again.returncode == 0
    assert "model" not in again.stderr  # nothing is measured twice
    results["layers"]["tiny/o/16x96/1"][0]["correct"] = False
    out.write_text(json.dumps(results))
    wrong = rehearse(out)
    assert (wrong.returncode, "differ from fp64" in wrong.stderr) == (1, True)


def results() -> dict[str, Any]:
    """Invented results of a real run's shape."""
    valid_for = {"device": "D", "torch": "1", "triton": "2", "cusparselt": "3"}
    device = {"valid_for": valid_for, "copy_bytes_per_s": 3e12, "bf16_product_flop_per_s": 8e14}
    rows = [
        {"pattern": "2:4", "batch": 1, "over_dense": 1.5, "of_copy_bandwidth": 0.9, "correct": True},
        {"pattern": "2:4", "batch": 8, "over_dense": 1.25, "of_copy_bandwidth": 0.8, "correct": False},
    ]
    model = {"dense": {"ms": {"decode": 6.0, "prefill": 90.0}, "resident_bytes": 16e9}}
    model["2:4"] = {"ms": {"decode": 4.0, "prefill": 60.0}, "resident_bytes": 9e9}
    layers = {f"M/o/8x8/{row['batch']}": [row] for row in rows}
    return {"version": 1, "rehearsal": False, "machine": {"device": device}, "layers": layers, "model": model}


def test_the_table_says_what_was_measured_and_what_was_wrong(tmp_path: Path) -> None:
    text = table.render(results())
    assert "| M/o/8x8 | 2:4 | 1.50 (90%) | 1.25 (80%) WRONG |" in text
    assert "| 2:4 | 4.00 | 1.50 | 60.00 | 1.50 | 9.00 |" in text
    page = tmp_path / "page.md"
    page.write_text(f"a\n{table.BEGIN}\nold\n{table.END}\nb\n")
    table.write_into(page, text)
    assert page.read_text() == f"a\n{table.BEGIN}\n{text}\n{table.END}\nb\n"
    page.write_text("no place")
    with pytest.raises(ConfigError, match="no place"):
        table.write_into(page, text)
    pruned = {"seconds_a_block": 2.0, "peak_bytes": 5e9}
    row = {"cpu": pruned, "device": pruned, "masks": {"own_statistics": 0.999}, "correct": False}
    assert "| crepe | 2.00 | 2.00 | 5.00 | 99.9000% WRONG |" in table.render(results() | {"prune": {"crepe": row}})
    nothing = copy.deepcopy(results()) | {"layers": {}, "model": {}}
    assert table.render(nothing) == table.NOTHING


def test_the_page_shows_the_committed_results() -> None:
    committed = ROOT / "bench" / "results" / "gpu.json"
    text = table.render(json.loads(committed.read_text())) if committed.exists() else table.NOTHING
    assert f"{table.BEGIN}\n{text}\n{table.END}" in (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "rehearsal": false}'])
def test_files_that_hold_something_else_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"gpu\.json"):
        command.load(path, True)
