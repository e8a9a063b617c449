"""Runs of `bench` on clockworks, stopped at a visit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from crepe_deploy.bench.benchmark import bench
from crepe_deploy.bench.gate.verdict import Verdict
from crepe_deploy.bench.run.result import Run, Visit, load_run
from crepe_deploy.bench.run.scenario import CandidateSpec, Scenario
from crepe_deploy.bench.run.worker import Turn

from tests.bench.run.test_measure import Clockwork

POINTS = [{"prompt_tokens": 8, "output_tokens": 4}, {"batch": 2, "prompt_tokens": 8, "output_tokens": 4}]
ROUNDS = 3
VISITS = 3 * len(POINTS) * 2  # of a round: dense twice over, and packed


class Machine:
    """Starts clockworks and raises `error` instead of visit number `at`; warm-up visits are not counted."""

    def __init__(self, at: int = -1, error: BaseException | None = None) -> None:
        self.left, self.error, self.log = at, error or KeyboardInterrupt(), list[tuple[str, Turn]]()

    def __call__(self, spec: CandidateSpec, _scenario: Scenario) -> Clockwork:
        machine = self

        class Stopping(Clockwork):
            def visit(self, turn: Turn) -> Visit:
                if turn.round >= 0:
                    if not machine.left:
                        raise machine.error
                    machine.left -= 1
                return super().visit(turn)

        return Stopping(spec, self.log, {"dense": 0.2, "dense again": 0.2}.get(spec.name, 0.1))

    @property
    def turns(self) -> list[tuple[str, int, str]]:
        return [(name, turn.round, turn.point.name) for name, turn in self.log if turn.round >= 0]


def measured(
    scenario: Scenario, out: Path, machine: Machine | None = None, **options: Any
) -> tuple[Run, Verdict | None, Machine]:
    machine = machine or Machine()
    result, verdict = bench(scenario, "c", start=machine, quiet=True, out=out, **options)
    assert load_run(out) == result
    return result, verdict, machine


def stopped(scenario: Scenario, out: Path, at: int, error: BaseException | None = None, **options: Any) -> Machine:
    machine = Machine(at, error)
    with pytest.raises(type(machine.error)):
        measured(scenario, out, machine, **options)
    assert not out.exists()
    return machine


def figures(result: Run) -> list[Any]:
    """All that does not tell when and how often the processes were started."""
    return [candidate.model_dump(exclude={"load_s"}) for candidate in result.candidates] + [result.noise]
