"""More rounds are measured only while a verdict is inconclusive, and looking often raises no false alarms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from crepe_deploy.bench.gate import looks
from crepe_deploy.bench.gate.budgets import Budgets
from crepe_deploy.bench.gate.gates import gate_pruned
from crepe_deploy.bench.gate.verdict import Verdict
from crepe_deploy.bench.run.result import Run

from crepe_deploy.errors import ConfigError
from tests.bench.runs import candidate, run


def budgets(**content: Any) -> Budgets:
    return Budgets.model_validate(content)


TPOT = budgets(relative=[{"metric": "tpot_s", "max_slowdown": 0.05}])


class Measurer:
    """A fake measurement: rounds of two arms, the second this much slower, with noise."""

    def __init__(self, factor: float, spread: float) -> None:
        self.factor, self.spread, self.asked = factor, spread, list[int]()
        self.dense, self.packed = list[float](), list[float]()

    def more(self, rounds: int) -> Run:
        self.asked.append(rounds)
        generator = np.random.default_rng(len(self.dense))
        self.dense += list(generator.lognormal(-4, self.spread, rounds))
        self.packed += list(self.factor * generator.lognormal(-4, self.spread, rounds))
        return run([candidate("dense", self.dense), candidate("packed", self.packed)])


def decide(measurer: Measurer, rounds: int, cap: int) -> Verdict:
    return looks.decide(
        measurer.more, lambda measured, count: gate_pruned(measured, ["packed"], TPOT, count), rounds, cap
    )


def test_more_rounds_are_measured_only_while_it_is_inconclusive() -> None:
    clear, unclear, hopeless = Measurer(1.5, 0.01), Measurer(1.15, 0.1), Measurer(1.05, 0.05)
    assert decide(clear, 6, 100).status == "FAIL" and clear.asked == [6]
    assert decide(unclear, 6, 200).status == "FAIL" and len(unclear.asked) > 1
    verdict = decide(hopeless, 6, 20)
    assert verdict.status == "INCONCLUSIVE" and hopeless.asked == [6, 6, 8] and verdict.looks == 3


def test_no_rounds_are_measured_where_they_cannot_help() -> None:
    measurer = Measurer(1.0, 0.01)
    limits = budgets(quality={"perplexity_ratio": 1.0})
    verdict = looks.decide(measurer.more, lambda taken, count: gate_pruned(taken, ["packed"], limits, count), 6, 90)
    assert verdict.status == "INVALID" and measurer.asked == [6]
    with pytest.raises(ConfigError, match="cap"):
        decide(measurer, 10, 5)


def test_looking_repeatedly_does_not_make_false_alarms_likelier() -> None:
    alarms = 0
    for seed in range(60):
        measurer = Measurer(1.05, 0.05)  # exactly at the budget: every FAIL is false
        measurer.dense, measurer.packed = [], []
        generator = np.random.default_rng(1000 + seed)

        def more(rounds: int, measurer: Measurer = measurer, generator: np.random.Generator = generator) -> Run:
            measurer.dense += list(generator.lognormal(-4, 0.05, rounds))
            measurer.packed += list(1.05 * generator.lognormal(-4, 0.05, rounds))
            return run([candidate("dense", measurer.dense), candidate("packed", measurer.packed)])

        judged = looks.decide(more, lambda taken, count: gate_pruned(taken, ["packed"], TPOT, count), 6, 48)
        alarms += judged.status == "FAIL"
    assert alarms <= 5
