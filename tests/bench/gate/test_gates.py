"""The two gates: pairing within a run, commits by ratios to each run's own baseline, and stored noise."""

from __future__ import annotations

from typing import Any

import pytest
from crepe_deploy.bench.gate.arms import COMMITS
from crepe_deploy.bench.gate.gates import calibrate, gate_commits, gate_pruned
from crepe_deploy.bench.run.result import load_run, save_run

from crepe_deploy.errors import ConfigError
from tests.bench.gate.gating import DENSE, TPOT, commits_gate, slower, two_runs
from tests.bench.runs import candidate, run


def test_the_twin_of_an_a_a_run_is_not_gated_between_commits() -> None:
    twin = candidate("dense again", DENSE, notes={"aa_of": "dense"})
    base = run([candidate("dense", DENSE), candidate("packed", DENSE)])
    new = run([candidate("dense", DENSE), candidate("packed", DENSE), twin])
    for pair in ((base, new), (new, base), (new, new)):
        verdict = commits_gate(*pair, TPOT)
        assert verdict.status == "PASS" and verdict.candidates == ["packed"]


def test_commits_are_compared_by_ratios_to_each_runs_own_baseline() -> None:
    for machine in (1.0, 1.4):
        assert commits_gate(*two_runs(1.0, machine), TPOT).status == "PASS"
        verdict = commits_gate(*two_runs(1.15, machine), TPOT)
        assert verdict.status == "FAIL" and verdict.gate == COMMITS
        assert verdict.rows[0].comparison == "ratios to each run's own control"
        assert verdict.rows[0].baseline is None


def test_without_a_control_commits_are_compared_unpaired_and_that_is_said() -> None:
    base, new = (run([candidate("dense", values)]) for values in (DENSE, slower(1.15)))
    verdict = commits_gate(base, new, TPOT)
    assert verdict.status == "FAIL" and verdict.rows[0].comparison == "unpaired"
    assert any("unpaired rows" in note for note in verdict.notes)
    assert commits_gate(base, base, TPOT).status == "PASS"


def test_candidates_that_are_missing_or_empty_are_unusable_input() -> None:
    base, _ = two_runs(1.0)
    with pytest.raises(ConfigError, match="no candidate 'packed'"):
        commits_gate(base, run([candidate("dense", DENSE)]), TPOT)
    with pytest.raises(ConfigError, match="no samples of 'packed'"):
        commits_gate(base, run([candidate("dense", DENSE), candidate("packed", [], series=[])]), TPOT)
    with pytest.raises(ConfigError, match="no samples of 'packed' at p"):
        gate_pruned(run([candidate("dense", DENSE), candidate("packed", [])]), ["packed"], TPOT)
    with pytest.raises(ConfigError, match="other than the run's baseline"):
        gate_pruned(base, ["dense"], TPOT)


def test_one_slowdown_for_everything_holds_first_and_later_tokens() -> None:
    verdict = gate_commits(*two_runs(1.15), 0.05)
    assert {row.metric for row in verdict.rows} == {"ttft_s", "tpot_s"} and verdict.status == "FAIL"
    with pytest.raises(ConfigError, match="max_slowdown"):
        gate_commits(*two_runs(1.0), -1.5)


def test_calibration_stores_the_noise_of_an_equal_pair(tmp_path: Any) -> None:
    again = candidate("dense again", slower(1.0), model_sha256="dense")
    measured = run([candidate("dense", DENSE), again, candidate("packed", slower(0.7))])
    save_run(measured, tmp_path / "run.json")
    noise = calibrate(tmp_path / "run.json", "dense again")
    assert load_run(tmp_path / "run.json").noise == noise and 0 < noise["p/tpot_s"] < 0.02
    with pytest.raises(ConfigError, match="not the same model"):
        calibrate(tmp_path / "run.json", "packed")
