"""A benchmark from beginning to end: check, load, warm up, measure, and more rounds where a gate cannot decide yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..progress import part, progress
from .gate.gates import Limits, gate_pruned
from .gate.looks import decide, planned_rounds
from .gate.verdict import Verdict
from .run.measure import Qualities, Session, Start, check, is_again
from .run.quality import measure_quality
from .run.result import Run
from .run.scenario import QualitySpec, Scenario


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
    if gating is not None:
        planned_rounds(scenario.rounds, gating.max_rounds)
        if not names:
            raise ConfigError("a gate needs a candidate besides the baseline")
    qualities = {} if scenario.quality is None else measure_qualities(scenario, scenario.quality, quiet=quiet)
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
            return session.run(qualities)

        if gating is None:
            return more_rounds(scenario.rounds), None
        limits = gating.limits
        verdict = decide(
            more_rounds, lambda run, looks: gate_pruned(run, names, limits, looks), scenario.rounds, gating.max_rounds
        )
        return session.run(qualities), verdict


def measure_qualities(scenario: Scenario, asked: QualitySpec, *, quiet: bool = False) -> Qualities:
    """Quality of every candidate that transformers can load, in processes that end before timing begins."""
    base = scenario.specs()[0]
    measured = [spec for spec in scenario.specs() if not is_again(spec, scenario) and loadable(spec.folder)]
    qualities: Qualities = {}
    with progress("measuring quality", quiet=quiet) as step:
        for index, spec in enumerate(measured, start=1):
            part(step, f"quality of '{spec.name}' ({index} of {len(measured)})")
            against = base.folder if spec.name != base.name and loadable(base.folder) else None
            qualities[spec.name] = measure_quality(
                spec.folder, against, asked.text, window=asked.window, max_tokens=asked.max_tokens,
                dtype=str(spec.dtype),
            )  # fmt: skip
    return qualities


def loadable(folder: Path) -> bool:
    """Whether transformers reads it; an ONNX graph has its own proof, made when it was exported."""
    return any(folder.glob("*.safetensors"))
