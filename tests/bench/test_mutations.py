"""Run files and pytest-benchmark's, spoilt in every place: the gate and the report refuse them or say something."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crepe_deploy.bench.gate.budgets import load_budgets
from crepe_deploy.bench.gate.gates import gate_files, gate_pruned
from crepe_deploy.bench.gate.pytest_json import parse_saved
from crepe_deploy.bench.gate.render import junit, markdown
from crepe_deploy.bench.gate.verdict import Verdict
from crepe_deploy.bench.report.compare import compare
from crepe_deploy.bench.report.loading import load_groups
from crepe_deploy.bench.run import statistics
from crepe_deploy.bench.run.result import Run, load_run
from crepe_deploy.bench.run.scenario import load_scenario, parse_points
from crepe_deploy.bench.run.summary import summary_lines

from crepe_deploy.errors import ConfigError, CrepeError
from crepe_deploy.store.reading import read_yaml
from tests.bench.gate.test_gate_command import pytest_json
from tests.bench.runs import candidate, quality, run
from tests.mutations import SPOILT, mutations, refusal


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is looked at here, and drawing samples takes most of the time."""
    monkeypatch.setattr(statistics, "RESAMPLES", 10)


FEW = (None, "", -1, 0, 10**30, 1e308, [])
TIMES = [0.02, 0.021, 0.02, 0.022, 0.02]


def show(verdict: Verdict) -> None:
    markdown(verdict)
    junit(verdict)
    json.loads(verdict.model_dump_json())


def survive(document: Any, path: Path, read: Callable[[Path], object], spoilt: tuple[Any, ...] = SPOILT) -> None:
    """Fail at the first mutation of a document that is answered otherwise than by a CrepeError of some lines."""
    for change, changed in mutations(document, spoilt):
        path.write_text(json.dumps(changed))
        assert len(refusal(change, lambda: read(path))) <= 2000, change


def a_run() -> Run:
    return run(
        [candidate("dense", TIMES, quality=quality(20.0)), candidate("packed", TIMES, quality=quality(21.0))],
        noise={"p/tpot_s": 0.001},
    )


def test_the_gate_takes_any_run(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text(a_run().model_dump_json())

    def judge(path: Path) -> None:
        for verdict in (
            lambda: gate_files(path, good, 0.1),
            lambda: gate_pruned(load_run(path), ["packed"], 0.1),
            lambda: summary_lines(load_run(path)),
        ):
            with contextlib.suppress(CrepeError):
                shown = verdict()
                if isinstance(shown, Verdict):
                    show(shown)

    survive(json.loads(good.read_text()), tmp_path / "spoilt.json", judge, FEW)


def test_the_gate_takes_any_file_of_pytest_benchmark(tmp_path: Path) -> None:
    good = pytest_json(tmp_path / "good.json")

    def judge(path: Path) -> None:
        show(gate_files(good, path, 0.1))
        show(gate_files(path, good, 0.1))

    survive(json.loads(good.read_text()), tmp_path / "spoilt.json", judge)


def test_the_report_takes_any_run_that_it_reads(tmp_path: Path) -> None:
    document = json.loads(a_run().model_dump_json())
    survive(document, tmp_path / "spoilt.json", lambda path: compare(load_groups([path])[0].latest), FEW)


def test_what_pytest_benchmark_leaves_out_may_be_missing_or_null(tmp_path: Path) -> None:
    good = pytest_json(tmp_path / "good.json")
    for name in ("commit_info", "machine_info", "extra_info"):
        document = json.loads(good.read_text())
        place = document["benchmarks"][0] if name == "extra_info" else document
        place[name] = None
        (tmp_path / "null.json").write_text(json.dumps(document))
        show(gate_files(tmp_path / "null.json", tmp_path / "null.json", 0.1))
    document = json.loads(good.read_text())
    document["machine_info"]["cpu"]["brand"] = document["machine_info"]["cpu"].pop("brand_raw")
    assert parse_saved(document, good).host["cpu"] == "Xeon"


@pytest.mark.parametrize("text", ["3", "[1]", "a", "null", "true", '"x"', "a: 1\na: 2", "relative: &a [*a]", "\x00"])
@pytest.mark.parametrize("read", [load_budgets, load_scenario])
def test_yaml_that_is_no_mapping_of_ours_is_refused(tmp_path: Path, text: str, read: Callable[[Path], object]) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        read(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("read", "name"),
    [(load_budgets, "budgets.yaml"), (load_budgets, "budgets-pruned.yaml"), (load_scenario, "bench-smollm2.yaml")],
)
def test_budgets_and_scenarios_spoilt_anywhere_are_refused_or_read(
    tmp_path: Path, read: Callable[[Path], object], name: str
) -> None:
    document = read_yaml(Path(__file__).parents[2] / "configs" / name)
    survive(document, tmp_path / "spoilt.yaml", read)


@pytest.mark.parametrize(
    "text", ["9" * 5000 + "x1+1", "1x" + "9" * 5000 + "+1", "1x1+" + "9" * 30, "\u00b2x1+1", "1x1"]
)
def test_points_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_points(text)
