"""A benchmark from beginning to end: check, load, warm up, measure, and more rounds where a gate cannot decide yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..progress import progress
from .measure import Session, Start, check
from .result import Run
from .scenario import Scenario

MIN_MORE: Final = 2

Undecided = Callable[[Run], bool]


def bench(
    scenario: Scenario,
    command: str,
    *,
    undecided: Undecided | None = None,
    max_rounds: int | None = None,
    start: Start | None = None,
    quiet: bool = False,
) -> Run:
    """Measure a scenario. Raises ConfigError and its kin before anything slow, CrepeError when a candidate dies.

    undecided: asked at each look of `schedule`, until it says no. command: what the run says it was made with. start:
    makes a candidate's process; for tests.
    """
    check(scenario)
    with Session(scenario, command, start) as session:
        with progress("loading candidates", quiet=quiet) as step:
            session.load(step)
        if scenario.warmup:
            with progress("warming up", quiet=quiet) as step:
                session.warm_up(step)
        for rounds in schedule(scenario.rounds, max_rounds):
            with progress(f"measuring up to round {rounds}", quiet=quiet) as step:
                session.measure(rounds - session.rounds, step)
            run = session.run()
            if undecided is None or not undecided(run):
                break
    return run


def schedule(rounds: int, max_rounds: int | None) -> list[int]:
    """After how many rounds a gate looks at the samples: at first, then each time half as many were added."""
    looks = [rounds]
    while max_rounds is not None and looks[-1] < max_rounds:
        looks.append(min(looks[-1] + max(MIN_MORE, looks[-1] // 2), max_rounds))
    return looks
