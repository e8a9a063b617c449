"""The gate's command line: each exit code, each kind of file, each output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crepe_deploy.bench.run.result import Run, save_run

from crepe_deploy import cli
from tests.bench.runs import candidate, run

DENSE = list(0.02 * np.array([1.0, 1.01, 0.99, 1.005, 0.995, 1.0]))


def times(factor: float, seed: int = 0, spread: float = 0.003) -> list[float]:
    return list(np.array(DENSE) * factor * np.random.default_rng(seed).lognormal(0, spread, len(DENSE)))


def saved(path: Path, measured: Run) -> Path:
    save_run(measured, path)
    return path


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Run files by what comparing them with `base` gives."""
    factors = {"base": 1.0, "same": 1.0, "slow": 1.3}
    made = {
        name: run([candidate("dense", times(1, seed)), candidate("packed", times(0.7 * factor, seed + 10))])
        for seed, (name, factor) in enumerate(factors.items())
    }
    made["noisy"] = run([candidate("dense", times(1, 5, 0.3)), candidate("packed", times(0.7, 6, 0.3))])
    made["elsewhere"] = run(made["same"].candidates, host={"cpu": "EPYC"})
    return {name: saved(tmp_path / f"{name}.json", one) for name, one in made.items()}


def pytest_json(path: Path, factor: float = 1.0, **changes: Any) -> Path:
    generator = np.random.default_rng(int(1000 * factor))
    control = list(generator.lognormal(-7, 0.02, 100))
    entry = {
        "fullname": "bench/test_x.py::test_x",
        "stats": {"data": [value * factor for value in generator.lognormal(-7, 0.02, 100)]},
        "extra_info": {"control_s": control},
    }
    machine = {"cpu": {"brand_raw": "Xeon", "count": 2}, "machine": "x86_64", "python_version": "3.11"}
    document = {"machine_info": machine, "commit_info": {"id": "abc"}, "benchmarks": [entry | changes]}
    path.write_text(json.dumps(document))
    return path


def call(*arguments: object) -> int:
    """The exit code of `crepe-deploy gate ARGUMENTS`, through the real entry point."""
    return cli.run(["gate", *map(str, arguments)])


@pytest.mark.parametrize(("new", "code"), [("same", 0), ("slow", 3), ("noisy", 4), ("elsewhere", 1)])
def test_exit_codes(capsys: pytest.CaptureFixture[str], runs: dict[str, Path], new: str, code: int) -> None:
    assert call(runs["base"], runs[new], "--max-slowdown", 0.1) == code
    captured = capsys.readouterr()
    assert "this commit against the last" in captured.out and "pruned against dense" not in captured.out
    assert captured.err.startswith("error: ") == (code != 0)


def test_a_process_of_its_own_ends_the_same(runs: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "crepe_deploy", "gate", str(runs["base"]), str(runs["slow"])]
    done = subprocess.run([*command, "--max-slowdown", "0.1", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 3 and json.loads(done.stdout)["status"] == "FAIL"
    assert done.stderr.startswith("error: FAIL, this commit against the last: packed: p tpot_s")


def test_another_machine_may_be_compared_by_ratios(runs: dict[str, Path]) -> None:
    arguments = (runs["base"], runs["elsewhere"], "--max-slowdown", 0.1, "--host-mismatch", "ratios")
    assert call(*arguments) == 0


def test_pruned_against_dense_within_one_run(
    capsys: pytest.CaptureFixture[str], runs: dict[str, Path], tmp_path: Path
) -> None:
    budgets = tmp_path / "budgets.yaml"
    budgets.write_text("relative: [{metric: tpot_s, max_slowdown: -0.2}]\n")
    assert call(runs["base"], "--pruned", "packed", "--budgets", budgets) == 0
    assert "pruned against dense" in capsys.readouterr().out
    budgets.write_text("relative: [{metric: tpot_s, max_slowdown: -0.4}]\n")
    assert call(runs["base"], "--pruned", "packed", "--budgets", budgets) == 3


def test_every_output_is_written_also_when_it_fails(
    capsys: pytest.CaptureFixture[str], runs: dict[str, Path], tmp_path: Path
) -> None:
    junit, comment = tmp_path / "out" / "junit.xml", tmp_path / "out" / "comment.md"
    arguments = ("--max-slowdown", 0.1, "--json", "--junit", junit, "--markdown", comment)
    assert call(runs["base"], runs["slow"], *arguments) == 3
    assert json.loads(capsys.readouterr().out)["status"] == "FAIL"
    assert ElementTree.parse(junit).getroot().get("failures") == "1"
    assert comment.read_text().startswith("### ❌ FAIL")
    assert sorted(path.name for path in junit.parent.iterdir()) == ["comment.md", "junit.xml"]


def test_an_output_that_cannot_be_written_is_said(capsys: pytest.CaptureFixture[str], runs: dict[str, Path]) -> None:
    junit = runs["base"] / "junit.xml"
    assert call(runs["base"], runs["same"], "--max-slowdown", 0.1, "--junit", junit) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_pytest_benchmarks_json_is_read_and_compared_by_its_control(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base, same, slow = (pytest_json(tmp_path / f"{factor}.json", factor) for factor in (1.0, 1.001, 1.3))
    assert call(base, same, "--max-slowdown", 0.1) == 0
    assert "ratios to each run's own control" in capsys.readouterr().out
    assert call(base, slow, "--max-slowdown", 0.1) == 3


def test_folders_of_pytest_benchmark_files_pair_by_order(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arm, factor in (("base", 1.0), ("new", 1.3), ("same", 1.0)):
        (tmp_path / arm).mkdir()
        for index in range(6):
            pytest_json(tmp_path / arm / f"{index}.json", factor * 2 ** (index % 2))
    assert call(tmp_path / "base", tmp_path / "new", "--max-slowdown", 0.1) == 3
    assert "paired by round" in capsys.readouterr().out
    assert call(tmp_path / "base", tmp_path / "same", "--max-slowdown", 0.1) == 0
    (tmp_path / "new" / "5.json").unlink()
    assert call(tmp_path / "base", tmp_path / "new", "--max-slowdown", 0.1) == 1
    assert "files 6 against 5" in capsys.readouterr().err


def test_benchmarks_that_are_gone_are_invalid_and_new_ones_are_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = pytest_json(tmp_path / "a.json")
    other = pytest_json(tmp_path / "b.json", fullname="bench/test_x.py::test_y")
    assert call(base, other, "--max-slowdown", 0.1) == 1
    captured = capsys.readouterr()
    assert "the candidate b.json was not measured there" in captured.err
    assert "not in the baseline, so not gated: bench/test_x.py::test_y" in captured.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        ('{"schema_version": 1, "kind": "crepe-dep', "perhaps cut short"),
        ("[]", "no benchmark run"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"machine_info": {}, "benchmarks": []}', "holds no benchmark"),
        ('{"machine_info": {}, "benchmarks": [{"fullname": "x", "stats": {"median": 1}}]}', "--benchmark-save-data"),
        ('{"machine_info": {}, "benchmarks": [{"fullname": "x", "stats": {"data": []}}]}', "no raw timings"),
        ('{"machine_info": {}, "benchmarks": [{"fullname": "x", "stats": {"data": [0]}}]}', "not positive"),
        ('{"machine_info": {}, "benchmarks": [{"fullname": "x", "stats": {"data": [1]}, '
         '"extra_info": {"control_s": [1, 2]}}]}', "1 timings and 2"),
    ],
)  # fmt: skip
def test_unusable_input_is_named_and_ends_with_2(
    capsys: pytest.CaptureFixture[str], runs: dict[str, Path], tmp_path: Path,
    content: str | None, message: str,
) -> None:  # fmt: skip
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    junit = tmp_path / "junit.xml"
    for pair in ((runs["base"], bad), (bad, runs["base"])):
        assert call(*pair, "--max-slowdown", 0.1, "--junit", junit) == 2
        error = capsys.readouterr().err
        assert "bad.json" in error and message in error
    assert not junit.exists()


def test_a_run_without_samples_is_unusable(
    capsys: pytest.CaptureFixture[str], runs: dict[str, Path], tmp_path: Path
) -> None:
    empty = saved(tmp_path / "empty.json", run([candidate("dense", DENSE), candidate("packed", [])]))
    assert call(runs["base"], empty, "--max-slowdown", 0.1) == 2
    assert "no samples of 'packed' at p" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["BASE"],
        ["BASE", "BASE"],
        ["BASE", "--max-slowdown", "0.1"],
        ["BASE", "BASE", "--max-slowdown", "0.1", "--budgets", "BASE"],
        ["BASE", "BASE", "--max-slowdown", "0.1", "--pruned", "packed"],
        ["BASE", "BASE", "--max-slowdown", "much"],
        ["BASE", "BASE", "--max-slowdown", "-2"],
        ["BASE", "--pruned", "packed", "--max-slowdown", "0.1", "--host-mismatch", "ratios"],
        ["BASE", "--pruned", "dense", "--max-slowdown", "0.1"],
        ["BASE", "--pruned", "nobody", "--max-slowdown", "0.1"],
        ["BASE", "BASE", "--candidate", "nobody", "--max-slowdown", "0.1"],
        ["BASE", "BASE", "--budgets", "/nowhere.yaml"],
        ["BASE", "--calibrate", "packed"],
        ["BASE", "--calibrate", "packed", "--max-slowdown", "0.1"],
        ["BASE", "BASE", "--frobnicate"],
        [],
    ],
)
def test_impossible_options_end_with_2(runs: dict[str, Path], arguments: list[str]) -> None:
    before = runs["base"].read_bytes()
    assert call(*[str(runs["base"]) if one == "BASE" else one for one in arguments]) == 2
    assert runs["base"].read_bytes() == before


def test_calibration_prints_what_it_stored(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    again = candidate("again", times(1, 3), model_sha256="dense")
    path = saved(tmp_path / "aa.json", run([candidate("dense", times(1, 4)), again]))
    assert call(path, "--calibrate", "again", "--json") == 0
    noise = json.loads(capsys.readouterr().out)["noise"]
    assert json.loads(path.read_text())["noise"] == noise and set(noise) > {"p/tpot_s", "p/ttft_s"}
    assert call(path, path, "--max-slowdown", 0.0001) == 1
    assert "lies below the noise" in capsys.readouterr().err


def test_what_pytest_benchmark_really_writes_is_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    test = "import time\ndef test_nap(benchmark):\n    benchmark.pedantic(time.sleep, (0.001,), rounds=20)\n"
    (tmp_path / "test_nap.py").write_text(test)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "test_nap.py", "--benchmark-only", "--benchmark-json"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # not a worker's
    for name in ("a.json", "b.json"):
        subprocess.run([*command, name], cwd=tmp_path, check=True, capture_output=True, env=env)
    compare = [*command[:-1], "--benchmark-compare=a.json"]
    assert b"test_nap" in subprocess.run(compare, cwd=tmp_path, check=True, capture_output=True, env=env).stdout
    assert call(tmp_path / "a.json", tmp_path / "b.json", "--max-slowdown", 5) == 0
    assert "test_nap.py::test_nap time_s" in capsys.readouterr().out


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'pydantic', 'rich.table'}"
    probe = f"import sys; from crepe_deploy.bench.commands import gate; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
