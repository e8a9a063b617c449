"""Gates over runs of a few invented figures, for the tests of what judges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from crepe_deploy.bench.gate.budgets import Budgets
from crepe_deploy.bench.gate.gates import Options, gate_commits, gate_pruned
from crepe_deploy.bench.gate.verdict import Row, Verdict
from crepe_deploy.bench.run.result import Run

from tests.bench.runs import candidate, run

WOBBLE = np.array([1.0, 1.01, 0.99, 1.005, 0.995, 1.0, 1.02, 0.98])
DENSE = list(0.02 * WOBBLE)


def budgets(**content: Any) -> Budgets:
    return Budgets.model_validate(content)


def slower(factor: float, seed: int = 0, spread: float = 0.004) -> list[float]:
    """Times that are this much slower than DENSE, round by round, with a little noise of their own."""
    return list(np.array(DENSE) * factor * np.random.default_rng(seed).lognormal(0, spread, len(DENSE)))


def pruned_gate(tpots_s: Sequence[float], limits: Budgets, noise: dict[str, float] | None = None) -> Verdict:
    measured = run([candidate("dense", DENSE), candidate("packed", tpots_s)], noise=noise)
    return gate_pruned(measured, ["packed"], limits)


def commits_gate(base: Run, new: Run, limits: Budgets, **options: Any) -> Verdict:
    return gate_commits(base, new, limits, Options(**options))


def only(verdict: Verdict, **attributes: Any) -> Row:
    rows = [row for row in verdict.rows if all(getattr(row, name) == value for name, value in attributes.items())]
    assert len(rows) == 1, verdict.rows
    return rows[0]


def two_runs(factor: float, machine: float = 1.0, **changes: Any) -> tuple[Run, Run]:
    """The same scenario twice; the second on a machine `machine` times as slow, with packed slower by `factor`."""
    base = run([candidate("dense", DENSE), candidate("packed", slower(0.7, 1))])
    dense, packed = list(np.array(DENSE) * machine), list(np.array(slower(0.7, 2)) * factor * machine)
    return base, run([candidate("dense", dense), candidate("packed", packed)], **changes)


TPOT = budgets(relative=[{"metric": "tpot_s", "max_slowdown": 0.05}])
