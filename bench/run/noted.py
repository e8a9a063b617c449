"""What a run has measured, whole rounds and qualities, noted in its journal where it has one, so that it goes on.

The order of a round and its prompts follow from its number, so a resumed run measures what an uninterrupted one would;
that it was resumed, and after which round, stands in the run's file.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from ...store.journal import Journal
from ...store.manifest import sha256_file
from .environment import VARIABLES, library_versions, load_average, record_host
from .result import Count, Quality, Record, Resumed, Seconds, Visit
from .scenario import Scenario

QUALITY: Final = "quality"
ROUND: Final = "round"
VISITS: Final = 2  # of each candidate to each point in a round

Read = TypeVar("Read", bound=Record)
Moment = Annotated[str, AfterValidator(lambda text: datetime.datetime.fromisoformat(text).isoformat())]


class Start(Record):
    """One start of all processes: its number, when, and the load of the machine before it."""

    number: Count
    at: Moment
    load: Annotated[float, Field(ge=0, le=1e9)]


class Round(Record):
    """A whole round. start: that made it. seconds: from then to its end. load_s, peak_bytes: of each process by then.

    visits: by candidate and point.
    """

    start: Start
    seconds: Seconds
    load_s: dict[str, Seconds]
    peak_bytes: dict[str, Count | None]
    visits: dict[str, dict[str, list[Visit]]]


class Noted:
    """The rounds and qualities of all starts of a run; without a journal, of this one.

    names, points: of the candidates and the points of every round. resumed: whether this start goes on with others.
    Raises ConfigError for a damaged journal.
    """

    def __init__(
        self, names: Sequence[str], points: Sequence[str], journal: Journal | None = None, *, resumed: bool = False
    ) -> None:
        self.rounds: list[Round] = []
        self._journal, self._names, self._points = journal, set(names), set(points)
        while (known := self._get(ROUND, str(len(self.rounds)), Round, self._is_next)) is not None:
            self.rounds.append(known)
        self._before = len(self.rounds)
        number = 1 + max((known.start.number for known in self.rounds), default=0) if resumed else 0
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.start = Start(number=number, at=now, load=load_average())

    def quality(self, name: str) -> Quality | None:
        """Of a candidate, where an earlier start measured it. Raises ConfigError for a damaged journal."""
        return self._get(QUALITY, name, Quality)

    def add_quality(self, name: str, quality: Quality) -> None:
        """A candidate's quality is measured. Raises DiskFullError."""
        self._add(QUALITY, name, quality)

    def add_round(self, **measured: Any) -> None:
        """The next round is measured: the fields of `Round` but its start. Raises DiskFullError."""
        self.rounds.append(Round(start=self.start, **measured))
        self._add(ROUND, str(len(self.rounds) - 1), self.rounds[-1])

    @property
    def earlier(self) -> list[Round]:
        """The last round of each earlier start."""
        return list({known.start.number: known for known in self.rounds[: self._before]}.values())

    def resumed(self) -> list[Resumed]:
        """When the run was gone on with, and after how many rounds."""
        first = {known.start.number: (known.start, index) for index, known in reversed(list(enumerate(self.rounds)))}
        starts = first | {self.start.number: (self.start, self._before)}
        return [Resumed(at=start.at, after_round=index) for number, (start, index) in sorted(starts.items()) if number]

    def _is_next(self, made: Round) -> bool:
        """Whether a round that was read may stand behind those that are known."""
        places = [visits for points in made.visits.values() for visits in points.values()]
        return (
            made.load_s.keys() == made.peak_bytes.keys() == made.visits.keys() == self._names
            and all(points.keys() == self._points for points in made.visits.values())
            and all([visit.round for visit in visits] == [len(self.rounds)] * VISITS for visits in places)
            and made.start.number >= max((known.start.number for known in self.rounds), default=0)
        )

    def _get(
        self, kind: str, key: str, form: type[Read], valid: Callable[[Read], bool] = lambda _: True
    ) -> Read | None:  # fmt: skip
        if self._journal is None:
            return None
        value = self._journal.get(kind, key, lambda value: (read := _read(form, value)) is not None and valid(read))
        return None if value is None else _read(form, value)

    def _add(self, kind: str, key: str, value: Record) -> None:
        if self._journal is not None:
            self._journal.add(kind, key, value.model_dump(mode="json"))


def identity(
    scenario: Scenario, facts: Mapping[str, Mapping[str, Any]], gate: Any, variables: Mapping[str, str]
) -> dict[str, Any]:
    """What must be equal for a run to be gone on with: a round that is measured otherwise is of another run.

    facts: of each candidate, its sha256 among them. gate: what judges, and how often it may look. variables: what
    candidates get besides this process's own. Raises CheckpointError.
    """
    known = {**os.environ, **variables}
    return {
        "what": "measuring", "scenario": scenario.model_dump(mode="json"), "threads": scenario.thread_count(),
        "models": {name: one["model_sha256"] for name, one in facts.items()}, "gate": gate,
        "text": None if scenario.quality is None else sha256_file(scenario.quality.text),
        "host": record_host().model_dump(mode="json", exclude={"memory_bytes"}), "libraries": library_versions(),
        "variables": {name: known[name] for name in VARIABLES if name in known},
    }  # fmt: skip


def _read(form: type[Read], value: Any) -> Read | None:
    try:
        return form.model_validate(value, strict=True)
    except ValidationError:
        return None
