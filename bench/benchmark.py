"""A benchmark from beginning to end: check, load, warm up, measure, and more rounds where a gate cannot decide yet."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..progress import progress
from .gate import Limits, decide, gate_pruned
from .measure import Session, Start, check
from .outcome import Verdict
from .result import Run
from .scenario import Scenario


@dataclass(frozen=True)
class Gating:
    """Candidates are judged against the baseline by `limits`; while inconclusive, with up to `max_rounds` rounds."""

    limits: Limits
    max_rounds: int


def bench(
    scenario: Scenario, command: str, *, gating: Gating | None = None, start: Start | None = None, quiet: bool = False
) -> tuple[Run, Verdict | None]:
    """Measure a scenario, and judge it where a gate is given.

    command: what the run says it was made with. start: makes a candidate's process; for tests. Raises ConfigError and
    its kin before anything slow, CrepeError when a candidate dies.
    """
    check(scenario)
    names = [c.name for c in scenario.candidates if c.name != scenario.baseline_name]
    if gating is not None and not names:
        raise ConfigError("a gate needs a candidate besides the baseline")
    with Session(scenario, command, start) as session:
        with progress("loading candidates", quiet=quiet) as step:
            session.load(step)
        if scenario.warmup:
            with progress("warming up", quiet=quiet) as step:
                session.warm_up(step)

        def more_rounds(rounds: int) -> Run:
            label = f"undecided after round {session.rounds}, measuring" if session.rounds else "measuring"
            with progress(label, quiet=quiet) as step:
                session.measure(rounds, step)
            return session.run()

        if gating is None:
            return more_rounds(scenario.rounds), None
        limits = gating.limits
        verdict = decide(
            more_rounds, lambda run, looks: gate_pruned(run, names, limits, looks), scenario.rounds, gating.max_rounds
        )
        return session.run(), verdict
