"""Whether a scenario measures what budgets ask for, said before anything is measured."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Final

from ..run.metrics import METRICS
from ..run.scenario import Scenario
from .budgets import Budgets, Objective, Relative
from .checks import MIN_ROUNDS

_BETWEEN_TOKENS: Final = ("tpot_s", "itl_", "decode_tokens")  # of which a single output token has none


def disagreements(scenario: Scenario, budgets: Budgets) -> list[str]:
    """Why a gate of this scenario's runs by these budgets could not decide, in words; empty where it can."""
    timed: list[Relative | Objective] = [*budgets.relative, *budgets.objectives]
    found = [text for budget in timed for text in _unmeasured(scenario, budget)]
    if budgets.quality.model_dump(exclude_none=True) and scenario.quality is None:
        found.append("there are budgets for quality, and the scenario has no `quality`")
    if scenario.rounds < MIN_ROUNDS:
        found.append(f"the scenario has {scenario.rounds} rounds, and a gate decides with at least {MIN_ROUNDS}")
    return list(dict.fromkeys(found))


def _unmeasured(scenario: Scenario, budget: Relative | Objective) -> Iterator[str]:
    if not (budget.metric in METRICS or budget.metric.startswith("itl")):
        yield f"{budget.metric} is of pytest-benchmark's files; a scenario measures {', '.join(METRICS)}"
        return
    points = [point for spec in scenario.points if fnmatchcase((point := spec.point()).name, budget.points)]
    if not points:
        names = ", ".join(spec.point().name for spec in scenario.points)
        yield f"there is a budget for {budget.metric} at '{budget.points}', which none of its points is: {names}"
    elif budget.metric.startswith(_BETWEEN_TOKENS) and all(point.output_tokens == 1 for point in points):
        names = ", ".join(point.name for point in points)
        yield f"there is a budget for {budget.metric}, and {names} gives one output token, which has none"
