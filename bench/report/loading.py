"""Runs from files, refused where nothing can be said of them, and grouped by what may be compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...errors import ConfigError
from ...store.reading import read_bytes
from ..run.result import Candidate, Run, Series, parse_run, workload_sha256

MOST_CANDIDATES: Final = 100


@dataclass(frozen=True)
class Source:
    """A run and the file it came from."""

    path: Path
    sha256: str
    run: Run


@dataclass(frozen=True)
class Group:
    """Runs of one scenario on one kind of machine with one baseline, oldest first: these may be compared."""

    sources: tuple[Source, ...]

    @property
    def latest(self) -> Run:
        return self.sources[-1].run


def load_groups(paths: Sequence[Path]) -> list[Group]:
    """Read run files. Raises ConfigError naming the one that is missing, cut short, inconsistent or without samples."""
    sources: dict[str, Source] = {}
    for path in paths:
        data = read_bytes(path, ConfigError)
        run = parse_run(data, path)
        _check(run, path)
        digest = hashlib.sha256(data).hexdigest()
        sources.setdefault(digest, Source(path, digest, run))
    groups: dict[str, list[Source]] = {}
    for source in sources.values():
        groups.setdefault(comparable_key(source.run), []).append(source)
    return [Group(tuple(sorted(members, key=lambda source: source.run.created))) for members in groups.values()]


def comparable_key(run: Run) -> str:
    """Equal for runs that may stand in one history: same scenario, machine, threads, workload and baseline."""
    baseline = run.candidate(run.baseline)
    return json.dumps(
        [
            run.name,
            run.environment.host.identity(),
            run.environment.threads,
            workload_sha256(run.workload),
            baseline.name,
            baseline.engine,
            baseline.model_sha256,
        ],
        sort_keys=True,
    )


def _check(run: Run, path: Path) -> None:
    try:
        run.candidate(run.baseline)
        for candidate in run.candidates:
            for series in candidate.series:
                run.point(series.point)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if len(run.candidates) > MOST_CANDIDATES:
        raise ConfigError(f"{path} has {len(run.candidates)} candidates: a report shows at most {MOST_CANDIDATES}")
    _check_unique([candidate.name for candidate in run.candidates], "candidate", path)
    _check_unique([point.name for point in run.workload.points], "point", path)
    for candidate in run.candidates:
        _check_unique([series.point for series in candidate.series], f"series of '{candidate.name}' at", path)
        _check_samples(candidate, path)
    if not any(visit.requests for c in run.candidates for series in c.series for visit in series.visits):
        raise ConfigError(f"{path} holds no samples: run `crepe-deploy bench` again and let it finish")


def _check_unique(names: list[str], what: str, path: Path) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path} names {what} '{name}' twice: names must differ")


def _check_samples(candidate: Candidate, path: Path) -> None:
    for series in candidate.series:
        if any(not math.isfinite(time) or time < 0 for time in _times(series)):
            raise ConfigError(
                f"{path}: '{candidate.name}' at '{series.point}' has a negative or infinite time: measure it again"
            )


def _times(series: Series) -> Iterator[float]:
    for visit in series.visits:
        yield visit.duration_s
        for request in visit.requests:
            yield from request.itl_s
            yield from (time for time in (request.ttft_s, request.latency_s) if time is not None)
