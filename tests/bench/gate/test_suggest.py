"""Budgets from a run's own noise: they load, an unchanged commit passes them, what cannot be told is a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from crepe_deploy.bench.commands.gate import gate_command
from crepe_deploy.bench.gate.budgets import Budgets, load_budgets
from crepe_deploy.bench.gate.gates import gate_commits, gate_pruned
from crepe_deploy.bench.gate.suggest import suggest
from crepe_deploy.bench.run.result import Memory, Point, Run, Workload, load_run, save_run

from crepe_deploy.errors import ConfigError
from tests.bench.gate.gating import DENSE, slower
from tests.bench.runs import candidate, quality, run, series

RESULTS = Path(__file__).resolve().parents[3] / "bench" / "results"


def noisy(spread: float, rounds: int = 8, **changes: Any) -> Run:
    """Dense, and packed in 0.7 of its time, give or take `spread` a round."""
    packed = slower(0.7, 3, spread)[:rounds]
    return run([candidate("dense", DENSE[:rounds]), candidate("packed", packed)], **changes)


def written(tmp_path: Path, text: str) -> Budgets:
    path = tmp_path / "budgets.yaml"
    path.write_text(text)
    return load_budgets(path)


@pytest.mark.parametrize("name", ["smollm2", "llama-1b", "structural-llama-1b", "onnx-speed"])
def test_every_shipped_run_passes_what_is_suggested_for_it(name: str, tmp_path: Path) -> None:
    measured = load_run(RESULTS / f"{name}.json")
    limits = written(tmp_path, suggest(measured, name).text)
    assert gate_commits(measured, measured, limits).status == "PASS"
    for one in measured.candidates[1:]:
        if "aa_of" not in one.notes:
            limits = written(tmp_path, suggest(measured, name, one.name).text)
            assert gate_pruned(measured, [one.name], limits).status == "PASS", one.name


def test_more_noise_asks_for_wider_budgets_and_the_twins_count() -> None:
    quiet, loud = (suggest(noisy(spread), "run.json").content["relative"][0] for spread in (0.003, 0.05))
    assert quiet["metric"] == loud["metric"] == "tpot_s" and quiet["points"] == "p"
    assert 0 < quiet["max_slowdown"] < loud["max_slowdown"] < 0.5
    twins = suggest(noisy(0.003, noise={"p/tpot_s": 0.1}), "run.json")
    assert twins.content["relative"][0]["max_slowdown"] > quiet["max_slowdown"]
    assert "equal models differ by ±10.5% in a run, ±15.2% between two" in twins.text


def test_what_lies_below_the_noise_is_a_warning_and_no_budget(tmp_path: Path) -> None:
    found = suggest(noisy(0.6), "run.json")
    assert [entry["metric"] for entry in found.content["relative"] or []] == ["ttft_s"]
    assert len(found.warnings) == 1 and "below the noise, not gated" in found.warnings[0]
    assert f"# WARNING: {found.warnings[0]}" in found.text
    written(tmp_path, found.text)


def test_against_dense_a_gain_is_demanded_and_quality_kept(tmp_path: Path) -> None:
    packed = candidate(
        "packed", slower(0.7, 3), quality=quality(30.0, (1.1, 1.2, 1.314)),
        memory=Memory(weights_bytes=656, loaded_bytes=2000, peak_bytes=3000),
    )  # fmt: skip
    measured = run([candidate("dense", DENSE, quality=quality(25.0)), packed])
    limits = written(tmp_path, suggest(measured, "run.json", "packed").text)
    assert limits.relative[0].max_slowdown == pytest.approx(-0.29, abs=0.02)
    assert limits.memory == {"weights": -0.34, "peak": 0.02}
    assert limits.quality.perplexity_ratio == 1.32 and limits.quality.same_top == 0.79
    assert gate_pruned(measured, ["packed"], limits).status == "PASS"


def test_names_with_marks_of_globs_and_yaml_stay_names(tmp_path: Path) -> None:
    point = 'a"[b]*: #\U0001f600'
    points = Workload(points=[Point(name=point, prompt_tokens=8, output_tokens=5)], seed=0, dtype="bfloat16")
    arms = [candidate(name, [], series=[series(point, DENSE)]) for name in ("dense", "x'\nrelative: []")]
    measured = run(arms, workload=points, name="n\nmemory: {}")
    for pruned in (None, arms[1].name):
        limits = written(tmp_path, suggest(measured, "run\u2028.json", pruned).text)
        assert gate_pruned(measured, [arms[1].name], limits).status == "PASS"
        assert len(limits.relative) == 2


def test_a_run_with_too_few_rounds_says_so() -> None:
    assert "3 rounds: a gate decides nothing with fewer than 5" in suggest(noisy(0.003, 3), "run.json").warnings
    with pytest.raises(ConfigError, match="at least two"):
        suggest(noisy(0.003, 1), "run.json")
    with pytest.raises(ConfigError, match="baseline"):
        suggest(noisy(0.003), "run.json", "dense")
    with pytest.raises(ConfigError, match="no candidate"):
        suggest(noisy(0.003), "run.json", "nobody")


def test_a_dense_model_alone_is_held_to_its_own_spread() -> None:
    measured = run([candidate("dense", DENSE)])
    assert suggest(measured, "run.json").content["relative"][0]["max_slowdown"] < 0.1


def test_the_command_prints_yaml_or_json_and_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    save_run(noisy(float(np.float64(0.003))), path)
    call = CliRunner().invoke
    printed = call(gate_command, [str(path), "--suggest-budgets"])
    assert printed.exit_code == 0 and yaml.safe_load(printed.stdout)["relative"]
    document = json.loads(call(gate_command, ["--suggest-budgets", str(path), "--json"]).stdout)
    assert document["budgets"] == yaml.safe_load(printed.stdout) and document["warnings"] == []
    for extra in (["--max-slowdown", "0.1"], [str(path)], ["--pruned", "a", "--pruned", "b"], ["--junit", "x.xml"]):
        refused = call(gate_command, [str(path), "--suggest-budgets", *extra])
        assert isinstance(refused.exception, ConfigError), extra
