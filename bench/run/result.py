"""The file that a benchmark run leaves: what was measured, of what, where and how, with every raw sample.

Run -> Candidate (one served model) -> Series (one workload point) -> Visit (one turn in a round) -> Request.
Whatever can be computed from the samples is not stored: `metrics` derives it, `statistics` compares it.
"""

from __future__ import annotations

import hashlib
import json
from codecs import BOM_UTF8
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ...errors import ConfigError
from ...store.files import write_text
from ...store.reading import parse_json, read_bytes

SCHEMA_VERSION: Final = 1
SHORTEST, LONGEST = 1e-12, 1e12  # seconds: what lies outside was not measured


def _possible(seconds: float) -> float:
    if seconds and not SHORTEST <= seconds <= LONGEST:
        raise ValueError(f"{seconds:g} is no time in seconds that can be measured")
    return seconds


Seconds = Annotated[float, AfterValidator(_possible)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Size = Annotated[int, Field(gt=0, lt=1 << 53)]


class Record(BaseModel):
    """A part of the file: what it does not know is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(Record):
    """A figure with its 95 % bootstrap interval; None where there were too few samples for one."""

    value: float
    low: float | None = None
    high: float | None = None


def _positive(ratio: Interval) -> Interval:
    if any(end is not None and end <= 0 for end in (ratio.value, ratio.low, ratio.high)):
        raise ValueError("a ratio is above 0")
    return ratio


Ratio = Annotated[Interval, AfterValidator(_positive)]


class Host(Record):
    """The machine. `isa`: the instruction set the packed kernels use; `gpu`: device names, none on a CPU machine."""

    cpu: str
    isa: str
    cores: Count
    memory_bytes: Count
    gpu: list[str] = Field(default_factory=list)
    system: str

    def identity(self) -> dict[str, Any]:
        """What must agree before two runs may be compared in absolute terms (not the kernel's version)."""
        return self.model_dump(exclude={"system", "memory_bytes"})


class Environment(Record):
    """Where a run was taken. `clock_mhz`: cores' frequency where readable; `load`: 1-minute average before, after."""

    host: Host
    versions: dict[str, str]
    threads: Count
    clock_mhz: float | None = None
    load: tuple[float, float]
    variables: dict[str, str] = Field(default_factory=dict)
    commit: str | None = None


class Point(Record):
    """One workload: `batch` sequences in lock step, or, where `concurrency` is given, that many independent requests
    in flight against a server, `requests` of them in a visit. Lengths are tokens of each sequence."""

    name: str
    prompt_tokens: Count
    output_tokens: Count
    batch: Count = 1
    concurrency: Count | None = None
    requests: Count = 1


class Workload(Record):
    """What decides whether two runs measured the same thing; see `workload_sha256`."""

    points: list[Point]
    seed: int
    dtype: str
    options: dict[str, Any] = Field(default_factory=dict)


class Request(Record):
    """One request: a sequence, or `sequences` of them in lock step. Times in seconds from its start.

    ttft_s: until the first new token. itl_s: gaps between later tokens, so `output_tokens - 1` of them (a server may
    send several tokens at once: then fewer). A failed request has an `error` and no times, and no statistic sees it.
    """

    sequences: Count = 1
    prompt_tokens: Count
    output_tokens: Count
    ttft_s: Seconds | None = None
    itl_s: list[Seconds] = Field(default_factory=list)
    latency_s: Seconds | None = None
    error: str | None = None


class Visit(Record):
    """One candidate's turn at one point. Two visits make a round, in the order A B B A. `round` 0 is the first."""

    round: Annotated[int, Field(gt=-(1 << 53), lt=1 << 53)]  # below 0 while warming up, which no run file keeps
    duration_s: Seconds
    requests: list[Request]


class Series(Record):
    """All visits to a candidate at the point of this name."""

    point: str
    visits: list[Visit]


class Layer(Record):
    """One linear layer: its shape as (out, in), and the fraction of zeros among its weights."""

    name: str
    shape: tuple[Size, Size]
    sparsity: Annotated[float, Field(ge=0, le=1)]
    pattern: str | None = None
    error: Annotated[float, Field(ge=0, le=1e30)] | None = None


class Memory(Record):
    """Bytes. weights: of the files. linears: held by the decoder blocks' linear layers, None where an engine hides it.

    loaded, peak: resident (on a GPU: allocated) after loading and at most. kv_token: of the cache, each token.
    """

    weights_bytes: Count
    linears_bytes: Count | None = None
    loaded_bytes: Count | None = None
    peak_bytes: Count | None = None
    kv_token_bytes: Count | None = None


class Quality(Record):
    """Measured with `convention`; against the baseline's logits where `kl_mean` and the rest are given."""

    convention: dict[str, Any]
    perplexity: Interval
    perplexity_ratio: Ratio | None = None
    kl_mean: Interval | None = None
    kl_p99: Interval | None = None
    same_top: Interval | None = None


class Candidate(Record):
    """One model in one engine. `kind`: what a reader calls it, such as "crepe 16:32 packed"; `model_sha256`: of the
    file hashes, so that a run says which weights it measured. load_s: one a process start."""

    name: str
    engine: str
    kind: str
    method: str | None = None
    pattern: str | None = None
    format: str = "dense"
    folder: str
    model_sha256: str
    load_s: list[Seconds]
    memory: Memory
    quality: Quality | None = None
    layers: list[Layer] = Field(default_factory=list)
    series: list[Series]
    notes: dict[str, Any] = Field(default_factory=dict)

    def series_at(self, point: str) -> Series:
        """What was measured at the point of this name; a series without visits where nothing was."""
        return next((series for series in self.series if series.point == point), Series(point=point, visits=[]))


class Resumed(Record):
    """A start of the processes that went on with a stopped run, and how many rounds were measured by then."""

    at: str
    after_round: Count


class Run(Record):
    """A whole benchmark. `baseline`: the name of the candidate that the others are compared with.

    noise: for each point and metric ("POINT/METRIC"), half-width of the 95 % interval of the log-ratio of two equal
    candidates (an A/A run), None where none was taken. resumed: a round's visits are always of one start.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: Literal["crepe-deploy-bench"] = "crepe-deploy-bench"
    name: str
    created: str
    command: str
    seconds: Seconds
    environment: Environment
    workload: Workload
    baseline: str
    candidates: list[Candidate]
    noise: dict[str, Annotated[float, Field(ge=0, le=100)]] | None = None
    resumed: list[Resumed] = Field(default_factory=list)

    def candidate(self, name: str) -> Candidate:
        """The candidate of this name. Raises ConfigError naming those there are."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise ConfigError(f"the run has no candidate '{name}'; it has {', '.join(c.name for c in self.candidates)}")

    def point(self, name: str) -> Point:
        """The workload point of this name. Raises ConfigError naming those there are."""
        for point in self.workload.points:
            if point.name == name:
                return point
        raise ConfigError(f"the run has no point '{name}'; it has {', '.join(p.name for p in self.workload.points)}")


def workload_sha256(workload: Workload) -> str:
    """Hex digest of everything in a workload; equal digests mean equal prompts, lengths, seeds and options."""
    return hashlib.sha256(json.dumps(workload.model_dump(), sort_keys=True).encode()).hexdigest()


def save_run(run: Run, path: Path) -> None:
    """Write a run as JSON, in one atomic step."""
    write_text(path, run.model_dump_json(indent=2) + "\n")


def load_run(path: Path) -> Run:
    """Read a run. Raises ConfigError naming the file: missing, truncated, of another kind or a higher version."""
    return parse_run(read_bytes(path, ConfigError), path)


def parse_run(data: bytes, path: Path) -> Run:
    """A run from the content of its file. Raises as `load_run` does."""
    document = parse_json(data, path, ConfigError)
    version = document.get("schema_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ConfigError(f"{path} has schema version {version}; this crepe-deploy reads up to {SCHEMA_VERSION}")
    try:
        return Run.model_validate_json(data.removeprefix(BOM_UTF8), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise ConfigError(f"{path} is no benchmark run: {place}: {first['msg']}") from error
