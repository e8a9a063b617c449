"""Looking more than once: measure further rounds while a verdict is inconclusive, up to a cap."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ...errors import ConfigError
from .verdict import Verdict

Measured = TypeVar("Measured")


def decide(
    more_rounds: Callable[[int], Measured], judge: Callable[[Measured, int], Verdict], rounds: int, cap: int
) -> Verdict:
    """Judge after `rounds` rounds, and while that is inconclusive after twice as many, up to `cap`.

    `more_rounds(n)` measures n further rounds and returns everything measured so far; `judge(measured, looks)` is given
    how often it may be asked, so that looking again and again does not make errors likelier. Raises ConfigError for a
    cap below `rounds`.
    """
    plan = planned_rounds(rounds, cap)
    done = 0
    for total in plan:
        verdict = judge(more_rounds(total - done), len(plan))
        done = total
        if not verdict.more_rounds_may_decide:
            break
    return verdict


def planned_rounds(rounds: int, cap: int) -> list[int]:
    """After how many rounds in all `decide` looks. Raises ConfigError for a cap below `rounds`."""
    if not 1 <= rounds <= cap:
        raise ConfigError(f"{rounds} rounds and at most {cap} cannot both be: the cap must not be smaller")
    plan = [rounds]
    while plan[-1] < cap:
        plan.append(min(2 * plan[-1], cap))
    return plan
