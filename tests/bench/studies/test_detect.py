"""The harness that tries the gate out, on a clock of its own; that it works on a real one is what it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from crepe_deploy.bench.gate.interleave import Interleaved, lingering, repeated
from crepe_deploy.bench.studies import ci_gate, detect

from crepe_deploy.errors import CrepeError


class Clock:
    """Time that passes only by working."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def work(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds


def test_visits_take_turns_and_a_round_is_what_most_agree_on() -> None:
    clock = Clock()
    works = {"a": lambda: clock.work("a", 1.0), "b": lambda: clock.work("b", 1.15)}
    measured = Interleaved(works, turns=2, clock=lambda: clock.now)
    measured.more(1)
    assert "".join(clock.calls) == "abbaabba"
    measured.more(2)
    arm = measured.arm("b", "point")
    (cell,) = arm.cells.values()
    assert dict(cell.rounds) == pytest.approx({0: 1.15, 1: 1.15, 2: 1.15}) and arm.paired


def test_an_interrupted_visit_leaves_the_round_alone() -> None:
    clock = Clock()
    costs = iter([1.0, 1.0, 1.0, 50.0, 1.0, 1.0] * 2)
    measured = Interleaved({"a": lambda: clock.work("a", next(costs))}, turns=3, clock=lambda: clock.now)
    measured.more(1)
    assert measured.rounds["a"] == {0: 1.0}


def test_planted_work_is_real() -> None:
    clock = Clock()
    repeated(lambda: clock.work("a", 1), 23)()
    assert len(clock.calls) == 23
    slow = lingering(lambda: clock.work("b", 1), 0.15)
    slow()
    assert clock.calls[-1] == "b"


def test_trials_are_counted_by_what_they_should_have_been() -> None:
    trials = [
        {"work": "w", "planted": planted, "status": status}
        for planted, status in ((False, "PASS"), (False, "FAIL"), (True, "FAIL"), (True, "INCONCLUSIVE"))
    ]
    equal, planted = detect.counts(trials)
    assert (equal["right"], equal["wanted"], equal["trials"]) == (1, "PASS", 2)
    assert planted["statuses"] == {"FAIL": 1, "INCONCLUSIVE": 1}


def test_the_committed_trials_reach_nineteen_of_twenty() -> None:
    report = json.loads((Path(__file__).resolve().parents[3] / "bench/results/detect.json").read_text())
    assert detect.counts(report["trials"]) == report["counts"]
    for row in report["counts"]:
        assert row["trials"] >= 20 and row["right"] >= 0.95 * row["trials"], row


def test_ci_names_benchmarks_that_do_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ci_gate, "SELECTED", "no_such_benchmark")
    with pytest.raises(CrepeError, match="did not run"):
        ci_gate.measure(tmp_path / "new.json")
