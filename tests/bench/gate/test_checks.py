"""Objectives, memory and quality, and what makes two arms incomparable before anything else is judged."""

from __future__ import annotations

from typing import Any

import pytest
from crepe_deploy.bench.gate.arms import COMMITS
from crepe_deploy.bench.gate.gates import gate_pruned
from crepe_deploy.bench.gate.judge import judge
from crepe_deploy.bench.run.result import Memory, Run, Series, Workload

from tests.bench.gate.gating import DENSE, TPOT, budgets, commits_gate, only, pruned_gate, slower, two_runs
from tests.bench.runs import CONVENTION, POINT, candidate, quality, request, run, series


def test_a_budget_for_what_was_not_measured_is_invalid() -> None:
    for limits in (
        budgets(relative=[{"metric": "time_s", "max_slowdown": 0.05}]),
        budgets(relative=[{"metric": "tpot_s", "points": "served-*", "max_slowdown": 0.05}]),
        budgets(objectives=[{"metric": "ttft_s", "points": "nowhere", "max": 1.0}]),
        budgets(memory={"kv_token": 0.1}),
        budgets(quality={"perplexity_ratio": 1.1}),
    ):
        verdict = pruned_gate(slower(1.0), limits)
        assert verdict.status == "INVALID", limits
        assert (
            "no sample" in verdict.rows[0].reason
            or "has no" in verdict.rows[0].reason
            or "not" in verdict.rows[0].reason
        )


def test_objectives_hold_quantiles_over_requests() -> None:
    passing = budgets(objectives=[{"metric": "ttft_s", "quantile": 0.9, "max": 0.2}])
    failing = budgets(objectives=[{"metric": "ttft_s", "quantile": 0.9, "max": 0.05}])
    assert pruned_gate(DENSE, passing).status == "PASS"
    verdict = pruned_gate(DENSE, failing)
    assert verdict.status == "FAIL" and verdict.rows[0].metric == "ttft_s p90" and verdict.rows[0].unit == "s"
    wide = budgets(objectives=[{"metric": "tpot_s", "quantile": 0.5, "max": 0.0201}])
    assert pruned_gate(DENSE, wide).status == "INCONCLUSIVE"
    assert pruned_gate(DENSE[:3], failing).status == "INCONCLUSIVE"


def test_objectives_hold_mean_rates() -> None:
    assert pruned_gate(DENSE, budgets(objectives=[{"metric": "decode_tokens_per_s", "min": 40}])).status == "PASS"
    assert pruned_gate(DENSE, budgets(objectives=[{"metric": "decode_tokens_per_s", "min": 60}])).status == "FAIL"


def test_memory_has_no_interval_and_is_decided_by_its_ratio() -> None:
    small = Memory(weights_bytes=600, peak_bytes=3100)
    measured = run([candidate("dense", DENSE), candidate("packed", DENSE, memory=small)])
    verdict = gate_pruned(measured, ["packed"], budgets(memory={"weights": -0.25, "peak": 0.02}))
    assert only(verdict, metric="weights_bytes").status == "PASS"
    assert only(verdict, metric="peak_bytes").status == "FAIL" and verdict.status == "FAIL"


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
    verdict = gate_pruned(measured, ["packed"], budgets(quality=limits))
    assert verdict.status == status and not verdict.more_rounds_may_decide


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
    verdict = gate_pruned(run([candidate("dense", DENSE), broken]), ["packed"], TPOT)
    assert verdict.status == "INVALID" and [row.check for row in verdict.rows] == ["errors"]
    assert "1 of 8 requests to packed failed, first: HTTP 500" in verdict.rows[0].reason


@pytest.mark.parametrize("change", [{"output_tokens": 4}, {"prompt_tokens": 9}])
def test_other_lengths_make_a_gate_invalid(change: dict[str, int]) -> None:
    short = candidate("packed", [], series=[series("p", DENSE, **change)])
    verdict = gate_pruned(run([candidate("dense", DENSE), short]), ["packed"], TPOT)
    assert verdict.status == "INVALID" and verdict.rows[0].check == "lengths" and "instead of" in verdict.rows[0].reason


def test_another_engine_than_the_baselines_is_said() -> None:
    other = candidate("packed", DENSE, engine="transformers")
    verdict = gate_pruned(run([candidate("dense", DENSE), other]), ["packed"], TPOT)
    assert verdict.status == "PASS" and any(
        "packed ran in transformers, dense in vllm" in note for note in verdict.notes
    )
    base, new = (run([candidate("dense", DENSE), candidate("packed", DENSE, engine=name)]) for name in ("vllm", "ort"))
    assert "engine vllm against ort" in commits_gate(base, new, TPOT).rows[0].reason


def test_another_machine_is_refused_unless_only_ratios_are_asked() -> None:
    limits = budgets(
        relative=[{"metric": "tpot_s", "max_slowdown": 0.05}],
        objectives=[{"metric": "ttft_s", "max": 0.001}],
        memory={"weights": 0.0},
    )
    runs = two_runs(1.0, 3.0, host={"cpu": "EPYC"})
    verdict = commits_gate(*runs, limits)
    assert verdict.status == "INVALID" and [row.check for row in verdict.rows] == ["host"]
    assert "cpu Xeon against EPYC" in verdict.rows[0].reason and "--host-mismatch ratios" in verdict.rows[0].reason
    allowed = commits_gate(*runs, limits, host_mismatch="ratios")
    assert allowed.status == "PASS" and {row.check for row in allowed.rows} == {"latency", "memory"}
    assert any("skipped" in note for note in allowed.notes) and any("two machines" in note for note in allowed.notes)
    worse = commits_gate(*two_runs(1.15, 3.0, host={"cpu": "EPYC"}), limits, host_mismatch="ratios")
    assert worse.status == "FAIL"


def test_on_another_machine_there_must_be_a_control_and_something_to_judge() -> None:
    base, new = run([candidate("dense", DENSE)]), run([candidate("dense", DENSE)], host={"cores": 8})
    verdict = commits_gate(base, new, TPOT, host_mismatch="ratios")
    assert verdict.status == "INVALID" and "no common control" in verdict.rows[0].reason
    objectives = budgets(objectives=[{"metric": "ttft_s", "max": 0.5}])
    assert commits_gate(*two_runs(1, 3, host={"cores": 8}), objectives, host_mismatch="ratios").status == "INVALID"


def test_another_workload_or_model_is_invalid() -> None:
    base = two_runs(1.0)[0]
    other = two_runs(1.0, workload=Workload(points=[POINT], seed=1, dtype="bfloat16"))[1]
    verdict = commits_gate(base, other, TPOT)
    assert verdict.status == "INVALID" and "workload differs: seed 0 against 1" in verdict.rows[0].reason
    swapped = run([candidate("dense", DENSE, model_sha256="other"), candidate("packed", slower(0.7))])
    verdict = commits_gate(base, swapped, TPOT)
    assert verdict.status == "INVALID" and "baseline weights dense against other" in verdict.rows[0].reason
    pattern = run([candidate("dense", DENSE), candidate("packed", slower(0.7), pattern="2:4")])
    assert "pattern" in commits_gate(base, pattern, TPOT).rows[0].reason


def test_changed_weights_of_the_pruned_candidate_are_said_and_not_refused() -> None:
    base, new = two_runs(1.0)
    changed = run([new.candidates[0], new.candidates[1].model_copy(update={"model_sha256": "new"})])
    verdict = commits_gate(base, changed, TPOT)
    assert verdict.status == "PASS" and any("pruning itself changed" in note for note in verdict.notes)


def test_a_verdict_needs_arms() -> None:
    with pytest.raises(ValueError, match="at least one pair"):
        judge([], TPOT, COMMITS)
