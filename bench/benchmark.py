"""A benchmark from beginning to end: check, load, warm up, measure, and more rounds where a gate cannot decide yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..progress import part, progress
from ..store.work import unfinished_file
from .gate.budgets import Budgets
from .gate.gates import Limits, gate_pruned
from .gate.looks import decide, planned_rounds
from .gate.verdict import Verdict
from .run.measure import Facts, Qualities, Session, Start, check, child_variables, facts_of, is_again, noted_by
from .run.noted import Noted, identity
from .run.quality import measure_quality
from .run.result import Run, save_run
from .run.scenario import QualitySpec, Scenario


@dataclass(frozen=True)
class Gating:
    """Candidates are judged against the baseline by `limits`; while inconclusive, with up to `max_rounds` rounds."""

    limits: Limits
    max_rounds: int

    def record(self) -> dict[str, Any]:
        """What decides how many rounds are measured."""
        limits = self.limits.model_dump(mode="json") if isinstance(self.limits, Budgets) else self.limits
        return {"limits": limits, "max_rounds": self.max_rounds}


def bench(
    scenario: Scenario, command: str, *, gating: Gating | None = None, start: Start | None = None, quiet: bool = False,
    out: Path | None = None, resume: bool = False, overwrite: bool = False,
) -> tuple[Run, Verdict | None]:  # fmt: skip
    """Measure a scenario, and judge it where a gate is given.

    command: what the run says it was made with. start: makes a candidate's process; for tests. out: the file to write
    the run to, and beside it, while it is not whole, its journal. resume: go on with what a stopped run left there: at
    most one round is measured again. Raises ConfigError and its kin before anything slow, CrepeError when a candidate
    dies, OutputError, DiskFullError.
    """
    check(scenario)
    names = [c.name for c in scenario.candidates if c.name != scenario.baseline_name]
    if gating is not None:
        planned_rounds(scenario.rounds, gating.max_rounds)
        if not names:
            raise ConfigError("a gate needs a candidate besides the baseline")
    facts = facts_of(scenario)
    if out is None:
        return _measured(scenario, command, gating, start, facts, noted_by(scenario), quiet=quiet)
    same = identity(scenario, facts, None if gating is None else gating.record(), child_variables(scenario))
    with unfinished_file(out, same, resume=resume, overwrite=overwrite) as journal:
        noted = noted_by(scenario, journal, resumed=resume)
        run, verdict = _measured(scenario, command, gating, start, facts, noted, quiet=quiet)
        save_run(run, out)
    return run, verdict


def _measured(
    scenario: Scenario, command: str, gating: Gating | None, start: Start | None, facts: Facts, noted: Noted, *,
    quiet: bool,
) -> tuple[Run, Verdict | None]:  # fmt: skip
    names = [c.name for c in scenario.candidates if c.name != scenario.baseline_name]
    qualities = measure_qualities(scenario, scenario.quality, noted, quiet=quiet) if scenario.quality else {}
    with Session(scenario, command, start, facts, noted) as session:
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


def measure_qualities(scenario: Scenario, asked: QualitySpec, noted: Noted, *, quiet: bool = False) -> Qualities:
    """Quality of every candidate that transformers can load, in processes that end before timing begins."""
    base = scenario.specs()[0]
    measured = [spec for spec in scenario.specs() if not is_again(spec, scenario) and loadable(spec.folder)]
    qualities: Qualities = {}
    with progress("measuring quality", quiet=quiet) as step:
        for index, spec in enumerate(measured, start=1):
            part(step, f"quality of '{spec.name}' ({index} of {len(measured)})")
            known = noted.quality(spec.name)
            if known is None:
                against = base.folder if spec.name != base.name and loadable(base.folder) else None
                known = measure_quality(
                    spec.folder, against, asked.text, window=asked.window, max_tokens=asked.max_tokens,
                    dtype=str(spec.dtype),
                )  # fmt: skip
                noted.add_quality(spec.name, known)
            qualities[spec.name] = known
    return qualities


def loadable(folder: Path) -> bool:
    """Whether transformers reads it; an ONNX graph has its own proof, made when it was exported."""
    return any(folder.glob("*.safetensors"))
