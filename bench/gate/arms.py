"""One side of a gate: what the verdict needs to know of a candidate, whatever file it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ..run.metrics import METRICS, SAMPLES, errors, rounds_of, succeeded
from ..run.result import Candidate, Quality, Run, Series
from .budgets import MEMORY_NAMES

Gate = Literal["pruned against dense", "this commit against the last"]
PRUNED: Final[Gate] = "pruned against dense"
COMMITS: Final[Gate] = "this commit against the last"

Key = tuple[str, str]  # point, metric
Rounds = Mapping[int, float]
Failure = tuple[Literal["errors", "lengths"], str, str]  # check, point, reason


@dataclass(frozen=True)
class Cell:
    """A metric at a point: one figure a round, and those of the run's own baseline in the same rounds."""

    unit: str
    better: Literal["lower", "higher"]
    rounds: Rounds
    control: Rounds | None = None


@dataclass(frozen=True)
class Arm:
    """A candidate as the verdict sees it.

    facts: "host", "workload", "model" -> what must agree between two arms. failures: for a point, why its requests
    cannot be compared. requests: raw samples of each round, for quantiles. noise: see `Run.noise`.
    versions: what may differ between commits and is then said. paired: rounds of equal numbers were taken together.
    """

    name: str
    cells: Mapping[Key, Cell]
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    requests: Mapping[Key, list[list[float]]] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    control_memory: Mapping[str, float] | None = None
    quality: Quality | None = None
    noise: Mapping[str, float] | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    paired: bool = False
    engine: str = ""


def arm(run: Run, name: str, gate: Gate) -> Arm:
    """One candidate of a run. Raises ConfigError for an unknown name."""
    candidate = run.candidate(name)
    control = run.candidate(run.baseline) if gate == COMMITS and name != run.baseline else None
    return Arm(
        name=name,
        cells=_cells(candidate, control),
        facts={
            "host": run.environment.host.identity() | {"threads": run.environment.threads},
            "workload": run.workload.model_dump(),
            "model": _model(candidate, control, gate),
        },
        failures=tuple(failure for series in candidate.series for failure in _failures(series, run, name)),
        requests=_requests(candidate),
        memory=_memory(candidate),
        control_memory=None if control is None else _memory(control),
        quality=candidate.quality,
        noise=run.noise,
        versions=run.environment.versions | {"weights": candidate.model_sha256},
        engine=candidate.engine,
    )


def _cells(candidate: Candidate, control: Candidate | None) -> dict[Key, Cell]:
    controls = {} if control is None else {series.point: series for series in control.series}
    cells = {}
    for series in candidate.series:
        for name, metric in METRICS.items():
            beside = rounds_of(controls[series.point], metric) if series.point in controls else None
            if rounds := rounds_of(series, metric):
                cells[series.point, name] = Cell(metric.unit, metric.better, rounds, beside)
    return cells


def _requests(candidate: Candidate) -> dict[Key, list[list[float]]]:
    requests = {}
    for series in candidate.series:
        for name, samples in SAMPLES.items():
            rounds: dict[int, list[float]] = {}
            for visit in series.visits:
                rounds.setdefault(visit.round, []).extend(samples(visit))
            if kept := [values for values in rounds.values() if values]:
                requests[series.point, name] = kept
    return requests


def _model(candidate: Candidate, control: Candidate | None, gate: Gate) -> dict[str, Any]:
    """What makes two candidates the same thing. Their weights may differ between commits: pruning may have changed."""
    if gate == PRUNED:
        return {}
    kind = {name: getattr(candidate, name) for name in ("engine", "method", "pattern", "format")}
    if control is None:
        return kind | {"weights": candidate.model_sha256}
    return kind | {"baseline weights": control.model_sha256, "baseline engine": control.engine}


def _failures(series: Series, run: Run, name: str) -> list[Failure]:
    failures: list[Failure] = []
    if failed := errors(series):
        total = sum(len(visit.requests) for visit in series.visits)
        failures.append(
            ("errors", series.point, f"{len(failed)} of {total} requests to {name} failed, first: {failed[0]}")
        )
    point = run.point(series.point)
    done = [request for visit in series.visits for request in succeeded(visit)]
    for what, asked in (("output", point.output_tokens), ("prompt", point.prompt_tokens)):
        other = [length for request in done if (length := getattr(request, f"{what}_tokens")) != asked]
        if other:
            text = f"{len(other)} of {len(done)} requests to {name} had {other[0]} {what} tokens instead of {asked}"
            failures.append(("lengths", series.point, text))
    return failures


def _memory(candidate: Candidate) -> dict[str, float]:
    values = {name: getattr(candidate.memory, f"{name}_bytes") for name in MEMORY_NAMES}
    return {name: float(value) for name, value in values.items() if value is not None}
