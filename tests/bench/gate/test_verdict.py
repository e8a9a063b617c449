"""Every status of every check, and the order in which they are judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from crepe_deploy.bench.gate import gate
from crepe_deploy.bench.gate.arms import COMMITS, PRUNED
from crepe_deploy.bench.gate.budgets import Budgets
from crepe_deploy.bench.gate.outcome import Row, Verdict
from crepe_deploy.bench.gate.verdict import verdict
from crepe_deploy.bench.run.result import Memory, Point, Run, Series, Workload

from crepe_deploy.errors import ConfigError
from tests.bench.runs import CONVENTION, POINT, candidate, quality, request, run, series

WOBBLE = np.array([1.0, 1.01, 0.99, 1.005, 0.995, 1.0, 1.02, 0.98])
DENSE = list(0.02 * WOBBLE)


def budgets(**content: Any) -> Budgets:
    return Budgets.model_validate(content)


def slower(factor: float, seed: int = 0, spread: float = 0.004) -> list[float]:
    """Times that are this much slower than DENSE, round by round, with a little noise of their own."""
    return list(np.array(DENSE) * factor * np.random.default_rng(seed).lognormal(0, spread, len(DENSE)))


def pruned_gate(tpots_s: Sequence[float], limits: Budgets, noise: dict[str, float] | None = None) -> Verdict:
    measured = run([candidate("dense", DENSE), candidate("packed", tpots_s)], noise=noise)
    return gate.gate_pruned(measured, ["packed"], limits)


def commits_gate(base: Run, new: Run, limits: Budgets, **options: Any) -> Verdict:
    return gate.gate_commits(base, new, limits, gate.Options(**options))


def only(found: Verdict, **attributes: Any) -> Row:
    rows = [row for row in found.rows if all(getattr(row, name) == value for name, value in attributes.items())]
    assert len(rows) == 1, found.rows
    return rows[0]


TPOT = budgets(relative=[{"metric": "tpot_s", "max_slowdown": 0.05}])


@pytest.mark.parametrize(
    ("factor", "spread", "status"),
    [(1.0, 0.004, "PASS"), (0.6, 0.004, "PASS"), (1.15, 0.004, "FAIL"), (1.05, 0.02, "INCONCLUSIVE")],
)
def test_a_slowdown_is_judged_by_its_interval(factor: float, spread: float, status: str) -> None:
    found = pruned_gate(slower(factor, spread=spread), TPOT)
    row = only(found, metric="tpot_s")
    assert (found.status, row.status, found.gate) == (status, status, PRUNED)
    assert row.comparison == "paired by round" and row.rounds == 8 and row.value is not None
    assert row.value.value == pytest.approx(factor, rel=0.02)


def test_throughput_is_worse_when_lower() -> None:
    limits = budgets(relative=[{"metric": "decode_tokens_per_s", "max_slowdown": 0.05}])
    found = only(pruned_gate(slower(1.15), limits), metric="decode_tokens_per_s")
    assert found.status == "FAIL" and found.value is not None and found.value.value == pytest.approx(1.15, rel=0.02)
    assert pruned_gate(slower(0.8), limits).status == "PASS"


def test_a_demanded_gain_fails_where_there_is_none() -> None:
    gain = budgets(relative=[{"metric": "tpot_s", "max_slowdown": -0.2}])
    assert pruned_gate(slower(1.0), gain).status == "FAIL"
    assert pruned_gate(slower(0.7), gain).status == "PASS"


@pytest.mark.parametrize(("metric", "floor"), [("tpot_s", 0.004), ("decode_tokens_per_s", 10)])
def test_a_difference_below_the_absolute_floor_never_fails(metric: str, floor: float) -> None:
    limits = {"metric": metric, "max_slowdown": 0.05}
    assert pruned_gate(slower(1.1), budgets(relative=[limits])).status == "FAIL"
    found = pruned_gate(slower(1.1), budgets(relative=[limits | {"floor": floor}]))
    assert found.status == "PASS" and "floor" in found.rows[0].reason
    assert pruned_gate(slower(1.5), budgets(relative=[limits | {"floor": floor}])).status == "FAIL"


def test_fewer_than_five_rounds_decide_nothing() -> None:
    found = pruned_gate(slower(2.0)[:4], TPOT)
    assert found.status == "INCONCLUSIVE" and "4 rounds, at least 5" in found.rows[0].reason
    assert found.more_rounds_may_decide


def test_arms_pair_by_the_number_of_the_round() -> None:
    neighbours = np.exp(np.random.default_rng(0).normal(0, 0.5, 9))
    dense = series("p", 0.02 * neighbours)
    packed = series("p", 0.02 * neighbours)
    broken = Series(point="p", visits=[visit for visit in packed.visits if visit.round not in (0, 4)])
    measured = run([candidate("dense", [], series=[dense]), candidate("packed", [], series=[broken])])
    found = gate.gate_pruned(measured, ["packed"], TPOT)
    assert found.status == "PASS" and found.rows[0].rounds == 7
    assert found.rows[0].value is not None and found.rows[0].value.value == pytest.approx(1)


def test_failing_is_corrected_for_the_number_of_rows_and_passing_is_not() -> None:
    # One arm that fails by itself, among many that are undecided: Holm asks for more evidence.
    names = [f"c{index}" for index in range(12)]
    values = np.array(DENSE) * 1.05 * np.exp(np.array([2, -0.2, 0.5, 1, 0.2, 3, 1.5, 0.5]) / 100)
    measured = run([candidate("dense", DENSE), *(candidate(name, list(values)) for name in names)])
    alone, many = gate.gate_pruned(measured, names[:1], TPOT), gate.gate_pruned(measured, names, TPOT)
    assert alone.status == "FAIL"
    assert many.status == "INCONCLUSIVE" and "corrected" in many.rows[0].reason
    assert many.rows[0].value == alone.rows[0].value


def test_false_alarms_over_many_rows_stay_rare() -> None:
    generator = np.random.default_rng(1)
    limits = budgets(relative=[{"metric": "tpot_s", "max_slowdown": 0.0}])
    alarms = 0
    for _ in range(60):
        rows = [candidate(f"c{index}", list(generator.lognormal(-4, 0.05, 8))) for index in range(6)]
        measured = run([candidate("dense", list(generator.lognormal(-4, 0.05, 8))), *rows])
        alarms += gate.gate_pruned(measured, [f"c{index}" for index in range(6)], limits).status == "FAIL"
    assert alarms <= 6  # 2.5 % expected, correlated by the shared baseline


def test_more_looks_make_each_of_them_stricter() -> None:
    measured = run([candidate("dense", DENSE), candidate("packed", slower(1.04, spread=0.005))])
    once, often = (gate.gate_pruned(measured, ["packed"], TPOT, looks) for looks in (1, 6))
    assert once.level == pytest.approx(0.95) and often.level == pytest.approx(1 - 0.05 / 6)
    first, last = once.rows[0].value, often.rows[0].value
    assert first is not None and last is not None and (last.high or 0) > (first.high or 9)


def test_a_budget_below_the_noise_is_invalid_and_says_what_would_make_sense() -> None:
    found = pruned_gate(slower(1.0), TPOT, noise={"p/tpot_s": 0.08})
    row = only(found, metric="tpot_s")
    assert found.status == "INVALID" and row.noise == 0.08
    assert "noise of 8.33%" in row.reason and "12.2" in row.reason
    assert pruned_gate(slower(1.0), TPOT, noise={"p/tpot_s": 0.02}).status == "PASS"


def test_noise_does_not_forbid_to_demand_no_slowdown_of_a_pruned_model() -> None:
    limits = budgets(relative=[{"metric": "tpot_s", "max_slowdown": 0.0}])
    assert pruned_gate(slower(0.7), limits, noise={"p/tpot_s": 0.08}).status == "PASS"
    base = run([candidate("dense", DENSE), candidate("packed", DENSE)], noise={"p/tpot_s": 0.08})
    assert commits_gate(base, base, limits).status == "INVALID"


def test_a_budget_for_what_was_not_measured_is_invalid() -> None:
    for limits in (
        budgets(relative=[{"metric": "time_s", "max_slowdown": 0.05}]),
        budgets(relative=[{"metric": "tpot_s", "points": "served-*", "max_slowdown": 0.05}]),
        budgets(objectives=[{"metric": "ttft_s", "points": "nowhere", "max": 1.0}]),
        budgets(memory={"kv_token": 0.1}),
        budgets(quality={"perplexity_ratio": 1.1}),
    ):
        found = pruned_gate(slower(1.0), limits)
        assert found.status == "INVALID", limits
        assert "no sample" in found.rows[0].reason or "has no" in found.rows[0].reason or "not" in found.rows[0].reason


def test_the_last_budget_that_matches_a_point_decides() -> None:
    limits = [{"metric": "tpot_s", "max_slowdown": 0.5}, {"metric": "tpot_s", "points": "p*", "max_slowdown": 0.05}]
    assert pruned_gate(slower(1.15), budgets(relative=limits)).status == "FAIL"
    assert pruned_gate(slower(1.15), budgets(relative=limits[::-1])).status == "PASS"


def test_objectives_hold_quantiles_over_requests() -> None:
    passing = budgets(objectives=[{"metric": "ttft_s", "quantile": 0.9, "max": 0.2}])
    failing = budgets(objectives=[{"metric": "ttft_s", "quantile": 0.9, "max": 0.05}])
    assert pruned_gate(DENSE, passing).status == "PASS"
    found = pruned_gate(DENSE, failing)
    assert found.status == "FAIL" and found.rows[0].metric == "ttft_s p90" and found.rows[0].unit == "s"
    wide = budgets(objectives=[{"metric": "tpot_s", "quantile": 0.5, "max": 0.0201}])
    assert pruned_gate(DENSE, wide).status == "INCONCLUSIVE"
    assert pruned_gate(DENSE[:3], failing).status == "INCONCLUSIVE"


def test_objectives_hold_mean_rates() -> None:
    assert pruned_gate(DENSE, budgets(objectives=[{"metric": "decode_tokens_per_s", "min": 40}])).status == "PASS"
    assert pruned_gate(DENSE, budgets(objectives=[{"metric": "decode_tokens_per_s", "min": 60}])).status == "FAIL"


def test_memory_has_no_interval_and_is_decided_by_its_ratio() -> None:
    small = Memory(weights_bytes=600, peak_bytes=3100)
    measured = run([candidate("dense", DENSE), candidate("packed", DENSE, memory=small)])
    found = gate.gate_pruned(measured, ["packed"], budgets(memory={"weights": -0.25, "peak": 0.02}))
    assert only(found, metric="weights_bytes").status == "PASS"
    assert only(found, metric="peak_bytes").status == "FAIL" and found.status == "FAIL"


@pytest.mark.parametrize(
    ("limits", "status"),
    [
        ({"perplexity_ratio": 2.2}, "PASS"),
        ({"perplexity_ratio": 1.5}, "FAIL"),
        ({"perplexity_ratio": 2.0}, "INCONCLUSIVE"),
        ({"kl_mean": 0.2}, "PASS"),
        ({"kl_mean": 0.05}, "FAIL"),
        ({"same_top": 0.75}, "PASS"),
        ({"same_top": 0.9}, "FAIL"),
        ({"same_top": 0.8}, "INCONCLUSIVE"),
        ({"kl_p99": 3}, "INVALID"),
    ],
)
def test_quality_is_held_against_its_own_interval(limits: dict[str, float], status: str) -> None:
    pruned = candidate("packed", DENSE, quality=quality(50, (1.9, 2.0, 2.1)))
    measured = run([candidate("dense", DENSE, quality=quality(25)), pruned])
    found = gate.gate_pruned(measured, ["packed"], budgets(quality=limits))
    assert found.status == status and not found.more_rounds_may_decide


def test_between_commits_perplexity_is_compared_on_the_same_text() -> None:
    def taken(ppl: float, **convention: Any) -> Run:
        packed = quality(ppl, (1.9, 2.0, 2.1), convention=CONVENTION | convention)
        return run([candidate("dense", DENSE), candidate("packed", DENSE, quality=packed)])

    limits = budgets(quality={"perplexity_ratio": 1.005})
    assert commits_gate(taken(50), taken(50.1), limits).status == "PASS"
    assert commits_gate(taken(50), taken(51), limits).status == "FAIL"
    assert "conventions" in commits_gate(taken(50), taken(50, window=64), limits).rows[0].reason


def test_failed_requests_make_a_gate_invalid_before_anything_else() -> None:
    bad = series("p", slower(2.0))
    visit = bad.visits[0].model_copy(update={"requests": [request(0.02, error="HTTP 500")]})
    broken = candidate("packed", [], series=[Series(point="p", visits=[visit, *bad.visits[1:]])])
    found = gate.gate_pruned(run([candidate("dense", DENSE), broken]), ["packed"], TPOT)
    assert found.status == "INVALID" and [row.check for row in found.rows] == ["errors"]
    assert "1 of 8 requests to packed failed, first: HTTP 500" in found.rows[0].reason


@pytest.mark.parametrize("change", [{"output_tokens": 4}, {"prompt_tokens": 9}])
def test_other_lengths_make_a_gate_invalid(change: dict[str, int]) -> None:
    short = candidate("packed", [], series=[series("p", DENSE, **change)])
    found = gate.gate_pruned(run([candidate("dense", DENSE), short]), ["packed"], TPOT)
    assert found.status == "INVALID" and found.rows[0].check == "lengths" and "instead of" in found.rows[0].reason


def test_another_engine_than_the_baselines_is_said() -> None:
    other = candidate("packed", DENSE, engine="transformers")
    found = gate.gate_pruned(run([candidate("dense", DENSE), other]), ["packed"], TPOT)
    assert found.status == "PASS" and any("packed ran in transformers, dense in vllm" in note for note in found.notes)
    base, new = (run([candidate("dense", DENSE), candidate("packed", DENSE, engine=name)]) for name in ("vllm", "ort"))
    assert "engine vllm against ort" in commits_gate(base, new, TPOT).rows[0].reason


def test_the_twin_of_an_a_a_run_is_not_gated_between_commits() -> None:
    twin = candidate("dense again", DENSE, notes={"aa_of": "dense"})
    base = run([candidate("dense", DENSE), candidate("packed", DENSE)])
    new = run([candidate("dense", DENSE), candidate("packed", DENSE), twin])
    for pair in ((base, new), (new, base), (new, new)):
        found = commits_gate(*pair, TPOT)
        assert found.status == "PASS" and found.candidates == ["packed"]


def two_runs(factor: float, machine: float = 1.0, **changes: Any) -> tuple[Run, Run]:
    """The same scenario twice; the second on a machine `machine` times as slow, with packed slower by `factor`."""
    base = run([candidate("dense", DENSE), candidate("packed", slower(0.7, 1))])
    dense, packed = list(np.array(DENSE) * machine), list(np.array(slower(0.7, 2)) * factor * machine)
    return base, run([candidate("dense", dense), candidate("packed", packed)], **changes)


def test_commits_are_compared_by_ratios_to_each_runs_own_baseline() -> None:
    for machine in (1.0, 1.4):
        assert commits_gate(*two_runs(1.0, machine), TPOT).status == "PASS"
        found = commits_gate(*two_runs(1.15, machine), TPOT)
        assert found.status == "FAIL" and found.gate == COMMITS
        assert found.rows[0].comparison == "ratios to each run's own control"
        assert found.rows[0].baseline is None


def test_without_a_control_commits_are_compared_unpaired_and_that_is_said() -> None:
    base, new = (run([candidate("dense", values)]) for values in (DENSE, slower(1.15)))
    found = commits_gate(base, new, TPOT)
    assert found.status == "FAIL" and found.rows[0].comparison == "unpaired"
    assert any("unpaired rows" in note for note in found.notes)
    assert commits_gate(base, base, TPOT).status == "PASS"


def test_another_machine_is_refused_unless_only_ratios_are_asked() -> None:
    limits = budgets(
        relative=[{"metric": "tpot_s", "max_slowdown": 0.05}],
        objectives=[{"metric": "ttft_s", "max": 0.001}],
        memory={"weights": 0.0},
    )
    runs = two_runs(1.0, 3.0, host={"cpu": "EPYC"})
    found = commits_gate(*runs, limits)
    assert found.status == "INVALID" and [row.check for row in found.rows] == ["host"]
    assert "cpu Xeon against EPYC" in found.rows[0].reason and "--host-mismatch ratios" in found.rows[0].reason
    allowed = commits_gate(*runs, limits, host_mismatch="ratios")
    assert allowed.status == "PASS" and {row.check for row in allowed.rows} == {"latency", "memory"}
    assert any("skipped" in note for note in allowed.notes) and any("two machines" in note for note in allowed.notes)
    worse = commits_gate(*two_runs(1.15, 3.0, host={"cpu": "EPYC"}), limits, host_mismatch="ratios")
    assert worse.status == "FAIL"


def test_on_another_machine_there_must_be_a_control_and_something_to_judge() -> None:
    base, new = run([candidate("dense", DENSE)]), run([candidate("dense", DENSE)], host={"cores": 8})
    found = commits_gate(base, new, TPOT, host_mismatch="ratios")
    assert found.status == "INVALID" and "no common control" in found.rows[0].reason
    objectives = budgets(objectives=[{"metric": "ttft_s", "max": 0.5}])
    assert commits_gate(*two_runs(1, 3, host={"cores": 8}), objectives, host_mismatch="ratios").status == "INVALID"


def test_another_workload_or_model_is_invalid() -> None:
    base = two_runs(1.0)[0]
    other = two_runs(1.0, workload=Workload(points=[POINT], seed=1, dtype="bfloat16"))[1]
    found = commits_gate(base, other, TPOT)
    assert found.status == "INVALID" and "workload differs: seed 0 against 1" in found.rows[0].reason
    swapped = run([candidate("dense", DENSE, model_sha256="other"), candidate("packed", slower(0.7))])
    found = commits_gate(base, swapped, TPOT)
    assert found.status == "INVALID" and "baseline weights dense against other" in found.rows[0].reason
    pattern = run([candidate("dense", DENSE), candidate("packed", slower(0.7), pattern="2:4")])
    assert "pattern" in commits_gate(base, pattern, TPOT).rows[0].reason


def test_changed_weights_of_the_pruned_candidate_are_said_and_not_refused() -> None:
    base, new = two_runs(1.0)
    changed = run([new.candidates[0], new.candidates[1].model_copy(update={"model_sha256": "new"})])
    found = commits_gate(base, changed, TPOT)
    assert found.status == "PASS" and any("pruning itself changed" in note for note in found.notes)


def test_noise_of_both_runs_adds_up_in_ratios_of_ratios() -> None:
    base, new = two_runs(1.0)
    noisy = base.model_copy(update={"noise": {"p/tpot_s": 0.04}})
    assert commits_gate(noisy, new, TPOT).status == "INVALID"  # 0.04 * sqrt(2) > log(1.05)
    found = commits_gate(noisy.model_copy(update={"noise": {"p/tpot_s": 0.03}}), new, TPOT)
    assert found.status == "PASS" and found.rows[0].noise == pytest.approx(0.03 * 2**0.5)


def test_a_point_that_one_arm_lacks_is_invalid() -> None:
    points = Workload(points=[POINT, Point(name="q", prompt_tokens=8, output_tokens=5)], seed=0, dtype="bfloat16")
    whole = [candidate(name, DENSE, series=[series("p", DENSE), series("q", DENSE)]) for name in ("dense", "packed")]
    lame = run([whole[0], candidate("packed", DENSE)], workload=points)
    found = gate.gate_pruned(lame, ["packed"], TPOT)
    assert found.status == "INVALID" and only(found, point="q").reason == "the candidate packed was not measured there"


def test_candidates_that_are_missing_or_empty_are_unusable_input() -> None:
    base, _ = two_runs(1.0)
    with pytest.raises(ConfigError, match="no candidate 'packed'"):
        commits_gate(base, run([candidate("dense", DENSE)]), TPOT)
    with pytest.raises(ConfigError, match="no samples of 'packed'"):
        commits_gate(base, run([candidate("dense", DENSE), candidate("packed", [], series=[])]), TPOT)
    with pytest.raises(ConfigError, match="no samples of 'packed' at p"):
        gate.gate_pruned(run([candidate("dense", DENSE), candidate("packed", [])]), ["packed"], TPOT)
    with pytest.raises(ConfigError, match="other than the run's baseline"):
        gate.gate_pruned(base, ["dense"], TPOT)


def test_one_slowdown_for_everything_holds_first_and_later_tokens() -> None:
    found = gate.gate_commits(*two_runs(1.15), 0.05)
    assert {row.metric for row in found.rows} == {"ttft_s", "tpot_s"} and found.status == "FAIL"
    with pytest.raises(ConfigError, match="max_slowdown"):
        gate.gate_commits(*two_runs(1.0), -1.5)


def test_a_verdict_needs_arms() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        verdict([], TPOT, COMMITS)


def test_calibration_stores_the_noise_of_an_equal_pair(tmp_path: Any) -> None:
    from crepe_deploy.bench.run.result import load_run, save_run

    again = candidate("dense again", slower(1.0), model_sha256="dense")
    measured = run([candidate("dense", DENSE), again, candidate("packed", slower(0.7))])
    save_run(measured, tmp_path / "run.json")
    noise = gate.calibrate(tmp_path / "run.json", "dense again")
    assert load_run(tmp_path / "run.json").noise == noise and 0 < noise["p/tpot_s"] < 0.02
    with pytest.raises(ConfigError, match="not the same model"):
        gate.calibrate(tmp_path / "run.json", "packed")
