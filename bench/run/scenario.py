"""What a benchmark measures, as data: a YAML file, or folders and options of the command line.

Unknown keys are refused, and whatever can be wrong is said before anything slow starts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ...errors import ConfigError
from ...store.reading import read_yaml
from .result import Point, Workload

AGAIN: Final = " again"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PointSpec(_Strict):
    """A workload point; see `result.Point`. Its name says what it is unless one is given."""

    name: str = ""
    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)
    batch: int = Field(default=1, ge=1)
    concurrency: int | None = Field(default=None, ge=1)
    requests: int = Field(default=1, ge=1)

    def point(self) -> Point:
        """As it is recorded."""
        width = f"b{self.batch}" if self.concurrency is None else f"c{self.concurrency}"
        name = self.name or f"{width}-p{self.prompt_tokens}-o{self.output_tokens}"
        return Point(**{**self.model_dump(), "name": name})


class CandidateSpec(_Strict):
    """A model folder in an engine; what is None is the scenario's."""

    name: str = Field(min_length=1)
    folder: Path
    engine: str | None = None
    dtype: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


class QualitySpec(_Strict):
    """Perplexity on a text, and KL against the baseline; the fields are those of `crepe-deploy eval`."""

    text: Path
    window: int = Field(default=2048, ge=2)
    max_tokens: int | None = Field(default=None, ge=2)


class Scenario(_Strict):
    """A whole benchmark. `aa`: measure the baseline twice, as two candidates, for the noise floor. `made_by`: the
    command that makes the folders, said where one is missing. `threads`: None for one a core."""

    name: str = Field(min_length=1)
    candidates: list[CandidateSpec] = Field(min_length=1)
    baseline: str | None = None
    engine: str = "vllm"
    dtype: str = "auto"
    options: dict[str, Any] = Field(default_factory=dict)
    points: list[PointSpec] = Field(min_length=1)
    rounds: int = Field(default=7, ge=1)
    warmup: int = Field(default=1, ge=0)
    seed: int = 0
    threads: int | None = Field(default=None, ge=1)
    quality: QualitySpec | None = None
    aa: bool = False
    made_by: str | None = None

    @field_validator("candidates")
    @classmethod
    def _distinct(cls, candidates: list[CandidateSpec]) -> list[CandidateSpec]:
        _no_twins("candidate", [candidate.name for candidate in candidates])
        return candidates

    @field_validator("points")
    @classmethod
    def _distinct_points(cls, points: list[PointSpec]) -> list[PointSpec]:
        _no_twins("point", [spec.point().name for spec in points])
        return points

    @property
    def baseline_name(self) -> str:
        """The candidate that the others are compared with: the first unless one is named."""
        return self.baseline if self.baseline is not None else self.candidates[0].name

    def specs(self) -> list[CandidateSpec]:
        """What is measured, the baseline first; twice for an A/A run. Engine and dtype are filled in."""
        filled = [
            candidate.model_copy(
                update={
                    "engine": candidate.engine or self.engine,
                    "dtype": candidate.dtype or self.dtype,
                    "options": {**(self.options if candidate.engine is None else {}), **candidate.options},
                }
            )
            for candidate in self.candidates
        ]
        base = next(candidate for candidate in filled if candidate.name == self.baseline_name)
        twin = [base.model_copy(update={"name": base.name + AGAIN})] if self.aa else []
        return [base, *twin, *(candidate for candidate in filled if candidate is not base)]

    def workload(self) -> Workload:
        """What two runs must share to have measured the same."""
        options: dict[str, Any] = {"engine": self.engine, "warmup": self.warmup}
        for key in ("engine", "dtype"):
            own = {c.name: getattr(c, key) for c in self.candidates if getattr(c, key) is not None}
            options |= {f"{key}_of": own} if own else {}
        own = {c.name: c.options for c in self.candidates if c.options}
        options |= ({"options": self.options} if self.options else {}) | ({"options_of": own} if own else {})
        points = [spec.point() for spec in self.points]
        return Workload(points=points, seed=self.seed, dtype=self.dtype, options=options)

    def thread_count(self) -> int:
        """Threads of each candidate: one a usable core unless given."""
        return self.threads or len(os.sched_getaffinity(0))


def load_scenario(path: Path) -> Scenario:
    """Read a scenario; its paths are relative to the file. Raises ConfigError naming the file, the key and its fix."""
    content = read_yaml(path, ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping with the keys {', '.join(Scenario.model_fields)}")
    return resolve(parse(content, str(path)), path.parent)


def parse(content: dict[str, Any], source: str) -> Scenario:
    """A scenario from plain data. Raises ConfigError that starts with `source`."""
    try:
        scenario = Scenario.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error)}") from error
    names = [candidate.name for candidate in scenario.candidates]
    if scenario.baseline_name not in names:
        raise ConfigError(f"{source}: baseline '{scenario.baseline}' is no candidate; there are {', '.join(names)}")
    if scenario.aa and scenario.baseline_name + AGAIN in names:
        raise ConfigError(f"{source}: aa needs the name '{scenario.baseline_name + AGAIN}' for its second arm")
    return scenario


def resolve(scenario: Scenario, root: Path) -> Scenario:
    """The same scenario with its paths, which are relative to `root`, relative to the working folder."""
    candidates = [c.model_copy(update={"folder": _from_here(root, c.folder)}) for c in scenario.candidates]
    quality = scenario.quality
    if quality is not None:
        quality = quality.model_copy(update={"text": _from_here(root, quality.text)})
    return scenario.model_copy(update={"candidates": candidates, "quality": quality})


def parse_points(text: str) -> list[dict[str, Any]]:
    """Points of the command line: `BATCHxPROMPT+OUTPUT`, or `CONCURRENCY@PROMPT+OUTPUT*REQUESTS` against a server."""
    return [_parse_point(part.strip()) for part in text.split(",")]


def _parse_point(text: str) -> dict[str, Any]:
    served = "@" in text
    width, _, rest = text.partition("@" if served else "x")
    prompt, _, output = rest.partition("+")
    output, star, requests = output.partition("*")
    numbers = [width, prompt, output, *([requests] if star else [])]
    if not all(re.fullmatch("[0-9]{1,9}", number) and int(number) for number in numbers):
        raise ConfigError(
            f"'{text}' is no point: write BATCHxPROMPT+OUTPUT, such as 1x64+32, or for a server "
            "CONCURRENCY@PROMPT+OUTPUT*REQUESTS, such as 4@128+32*16"
        )
    shape = {"prompt_tokens": int(prompt), "output_tokens": int(output), "requests": int(requests) if star else 1}
    return shape | {"concurrency" if served else "batch": int(width)}


def _from_here(root: Path, path: Path) -> Path:
    try:
        place = (root / path).resolve()
    except (ValueError, OSError, RuntimeError) as cause:  # a NUL in the name, a link to itself
        raise ConfigError(f"{str(path)!r} is no path: {cause}") from cause
    here = Path.cwd().resolve()
    return place.relative_to(here) if place.is_relative_to(here) else place


def _no_twins(what: str, names: Sequence[str]) -> None:
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise ValueError(f"more than one {what} is named '{twins[0]}'")


_SECTIONS: Final[dict[str, type[_Strict]]] = {
    "candidates": CandidateSpec,
    "points": PointSpec,
    "quality": QualitySpec,
}


def _explain(error: ValidationError) -> str:
    """The first problem: where it is, what is wrong, and for an unknown key those that are known."""
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        section = _SECTIONS.get(str(first["loc"][0]), Scenario) if len(first["loc"]) > 1 else Scenario
        return f"unknown key '{place}'; known are {', '.join(section.model_fields)}"
    if first["type"] == "missing":
        return f"'{place}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message[0].lower()}{message[1:]}"
