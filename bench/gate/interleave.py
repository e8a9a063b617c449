"""Timing callables in one process, in turns of A B B A, for gates over small things.

A round is several turns, and its figure the first decile of a callable's visits in them: other work on the machine
that interrupts some visits then leaves the figure alone, provided a visit is shorter than a scheduler's time slice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..run.statistics import undisturbed
from .arms import Arm, Cell
from .budgets import TIME

Work = Callable[[], object]
Clock = Callable[[], float]


@dataclass
class Interleaved:
    """Two or more callables and the seconds of each in each round so far."""

    works: Mapping[str, Work]
    turns: int = 10
    clock: Clock = time.perf_counter
    rounds: dict[str, dict[int, float]] = field(default_factory=dict)

    def warm_up(self, times: int = 2) -> None:
        """Run everything, without keeping times."""
        for _ in range(times):
            for work in self.works.values():
                work()

    def more(self, count: int) -> None:
        """Measure `count` further rounds."""
        done = max((len(rounds) for rounds in self.rounds.values()), default=0)
        for index in range(done, done + count):
            visits: dict[str, list[float]] = {name: [] for name in self.works}
            for name in [*self.works, *reversed(list(self.works))] * self.turns:
                start = self.clock()
                self.works[name]()
                visits[name].append(self.clock() - start)
            for name, seconds in visits.items():
                self.rounds.setdefault(name, {})[index] = undisturbed(seconds)

    def arm(self, name: str, point: str) -> Arm:
        """One of them as a side of a gate; both sides were taken together, so they pair by round."""
        return Arm(name, {(point, TIME): Cell("s", "lower", dict(self.rounds[name]))}, paired=True)


def repeated(work: Work, times: int) -> Work:
    """The same work so many times: what a slow-down of real work is made of."""

    def run() -> None:
        for _ in range(times):
            work()

    return run


def lingering(work: Work, share: float) -> Work:
    """The work, and then staying busy for this share of the time that it took."""

    def run() -> None:
        start = time.perf_counter()
        work()
        end = time.perf_counter()
        while time.perf_counter() - end < share * (end - start):
            pass

    return run
