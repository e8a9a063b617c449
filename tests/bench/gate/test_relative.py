"""Slow-downs relative to a baseline: intervals, floors, noise, and the correction for many rows."""

from __future__ import annotations

import numpy as np
import pytest
from crepe_deploy.bench.gate.arms import PRUNED
from crepe_deploy.bench.gate.gates import gate_pruned
from crepe_deploy.bench.run.result import Point, Series, Workload

from tests.bench.gate.gating import DENSE, TPOT, budgets, commits_gate, only, pruned_gate, slower, two_runs
from tests.bench.runs import POINT, candidate, run, series


@pytest.mark.parametrize(
    ("factor", "spread", "status"),
    [(1.0, 0.004, "PASS"), (0.6, 0.004, "PASS"), (1.15, 0.004, "FAIL"), (1.05, 0.02, "INCONCLUSIVE")],
)
def test_a_slowdown_is_judged_by_its_interval(factor: float, spread: float, status: str) -> None:
    verdict = pruned_gate(slower(factor, spread=spread), TPOT)
    row = only(verdict, metric="tpot_s")
    assert (verdict.status, row.status, verdict.gate) == (status, status, PRUNED)
    assert row.comparison == "paired by round" and row.rounds == 8 and row.value is not None
    assert row.value.value == pytest.approx(factor, rel=0.02)


def test_throughput_is_worse_when_lower() -> None:
    limits = budgets(relative=[{"metric": "decode_tokens_per_s", "max_slowdown": 0.05}])
    row = only(pruned_gate(slower(1.15), limits), metric="decode_tokens_per_s")
    assert row.status == "FAIL" and row.value is not None and row.value.value == pytest.approx(1.15, rel=0.02)
    assert pruned_gate(slower(0.8), limits).status == "PASS"


def test_a_demanded_gain_fails_where_there_is_none() -> None:
    gain = budgets(relative=[{"metric": "tpot_s", "max_slowdown": -0.2}])
    assert pruned_gate(slower(1.0), gain).status == "FAIL"
    assert pruned_gate(slower(0.7), gain).status == "PASS"


@pytest.mark.parametrize(("metric", "floor"), [("tpot_s", 0.004), ("decode_tokens_per_s", 10)])
def test_a_difference_below_the_absolute_floor_never_fails(metric: str, floor: float) -> None:
    limits = {"metric": metric, "max_slowdown": 0.05}
    assert pruned_gate(slower(1.1), budgets(relative=[limits])).status == "FAIL"
    verdict = pruned_gate(slower(1.1), budgets(relative=[limits | {"floor": floor}]))
    assert verdict.status == "PASS" and "floor" in verdict.rows[0].reason
    assert pruned_gate(slower(1.5), budgets(relative=[limits | {"floor": floor}])).status == "FAIL"


def test_fewer_than_five_rounds_decide_nothing() -> None:
    verdict = pruned_gate(slower(2.0)[:4], TPOT)
    assert verdict.status == "INCONCLUSIVE" and "4 rounds, at least 5" in verdict.rows[0].reason
    assert verdict.more_rounds_may_decide


def test_arms_pair_by_the_number_of_the_round() -> None:
    neighbours = np.exp(np.random.default_rng(0).normal(0, 0.5, 9))
    dense = series("p", 0.02 * neighbours)
    packed = series("p", 0.02 * neighbours)
    broken = Series(point="p", visits=[visit for visit in packed.visits if visit.round not in (0, 4)])
    measured = run([candidate("dense", [], series=[dense]), candidate("packed", [], series=[broken])])
    verdict = gate_pruned(measured, ["packed"], TPOT)
    assert verdict.status == "PASS" and verdict.rows[0].rounds == 7
    assert verdict.rows[0].value is not None and verdict.rows[0].value.value == pytest.approx(1)


def test_failing_is_corrected_for_the_number_of_rows_and_passing_is_not() -> None:
    # One arm that fails by itself, among many that are undecided: Holm asks for more evidence.
    names = [f"c{index}" for index in range(12)]
    values = np.array(DENSE) * 1.05 * np.exp(np.array([2, -0.2, 0.5, 1, 0.2, 3, 1.5, 0.5]) / 100)
    measured = run([candidate("dense", DENSE), *(candidate(name, list(values)) for name in names)])
    alone, many = gate_pruned(measured, names[:1], TPOT), gate_pruned(measured, names, TPOT)
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
        alarms += gate_pruned(measured, [f"c{index}" for index in range(6)], limits).status == "FAIL"
    assert alarms <= 6  # 2.5 % expected, correlated by the shared baseline


def test_more_looks_make_each_of_them_stricter() -> None:
    measured = run([candidate("dense", DENSE), candidate("packed", slower(1.04, spread=0.005))])
    once, often = (gate_pruned(measured, ["packed"], TPOT, looks) for looks in (1, 6))
    assert once.level == pytest.approx(0.95) and often.level == pytest.approx(1 - 0.05 / 6)
    first, last = once.rows[0].value, often.rows[0].value
    assert first is not None and last is not None and (last.high or 0) > (first.high or 9)


def test_a_budget_below_the_noise_is_invalid_and_says_what_would_make_sense() -> None:
    verdict = pruned_gate(slower(1.0), TPOT, noise={"p/tpot_s": 0.08})
    row = only(verdict, metric="tpot_s")
    assert verdict.status == "INVALID" and row.noise == 0.08
    assert "noise of 8.33%" in row.reason and "12.2" in row.reason
    assert pruned_gate(slower(1.0), TPOT, noise={"p/tpot_s": 0.02}).status == "PASS"


@pytest.mark.parametrize(("factor", "status"), [(1.0, "INCONCLUSIVE"), (1.1, "INCONCLUSIVE"), (1.3, "FAIL")])
def test_a_budget_below_the_noise_may_warn_and_then_fails_what_can_be_told(factor: float, status: str) -> None:
    measured = run([candidate("dense", DENSE), candidate("packed", slower(factor))], noise={"p/tpot_s": 0.08})
    verdict = gate_pruned(measured, ["packed"], TPOT, below_noise="warn")
    row = only(verdict, metric="tpot_s")
    assert (verdict.status, row.limit) == (status, pytest.approx(1.122))
    assert "budget of 5.00% lies below the noise of 8.33%" in row.reason
    assert gate_pruned(measured, ["packed"], TPOT, below_noise="invalid").status == "INVALID"


def test_noise_does_not_forbid_to_demand_no_slowdown_of_a_pruned_model() -> None:
    limits = budgets(relative=[{"metric": "tpot_s", "max_slowdown": 0.0}])
    assert pruned_gate(slower(0.7), limits, noise={"p/tpot_s": 0.08}).status == "PASS"
    base = run([candidate("dense", DENSE), candidate("packed", DENSE)], noise={"p/tpot_s": 0.08})
    assert commits_gate(base, base, limits).status == "INVALID"


def test_the_last_budget_that_matches_a_point_decides() -> None:
    limits = [{"metric": "tpot_s", "max_slowdown": 0.5}, {"metric": "tpot_s", "points": "p*", "max_slowdown": 0.05}]
    assert pruned_gate(slower(1.15), budgets(relative=limits)).status == "FAIL"
    assert pruned_gate(slower(1.15), budgets(relative=limits[::-1])).status == "PASS"


def test_noise_of_both_runs_adds_up_in_ratios_of_ratios() -> None:
    base, new = two_runs(1.0)
    noisy = base.model_copy(update={"noise": {"p/tpot_s": 0.04}})
    assert commits_gate(noisy, new, TPOT).status == "INVALID"  # 0.04 * sqrt(2) > log(1.05)
    verdict = commits_gate(noisy.model_copy(update={"noise": {"p/tpot_s": 0.03}}), new, TPOT)
    assert verdict.status == "PASS" and verdict.rows[0].noise == pytest.approx(0.03 * 2**0.5)


def test_a_point_that_one_arm_lacks_is_invalid() -> None:
    points = Workload(points=[POINT, Point(name="q", prompt_tokens=8, output_tokens=5)], seed=0, dtype="bfloat16")
    whole = [candidate(name, DENSE, series=[series("p", DENSE), series("q", DENSE)]) for name in ("dense", "packed")]
    lame = run([whole[0], candidate("packed", DENSE)], workload=points)
    verdict = gate_pruned(lame, ["packed"], TPOT)
    assert (
        verdict.status == "INVALID" and only(verdict, point="q").reason == "the candidate packed was not measured there"
    )
