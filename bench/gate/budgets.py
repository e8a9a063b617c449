"""How much worse a candidate may be: the budgets file of the gate, in YAML or JSON, unknown keys refused.

    relative:                              # against the baseline; the last entry that matches a point decides
      - {metric: tpot_s, max_slowdown: 0.05, floor: 0.0002}
      - {metric: tpot_s, points: "prefill-*", max_slowdown: 0.10}
    objectives:                            # absolute, on the machine that was measured
      - {metric: ttft_s, quantile: 0.95, max: 0.5}
      - {metric: output_tokens_per_s, min: 20}
    memory: {peak: 0.02, weights: 0.0}     # growth, as a fraction
    quality: {perplexity_ratio: 1.05, kl_mean: 0.1, same_top: 0.9}

A `max_slowdown` is a fraction: 0.05 allows 5 % more time, or the throughput of 5 % more time. A negative one demands a
gain. `floor` is what a difference must exceed besides, in the metric's own unit, before it can fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...errors import ConfigError
from ...nearest import meant
from ...store.reading import read_yaml
from ..run.metrics import METRICS

TIME: Final = "time_s"  # what a micro-benchmark measures
REQUEST_METRICS: Final = ("ttft_s", "tpot_s", "itl_s", "latency_s", TIME)
MemoryName = Literal["weights", "linears", "loaded", "peak", "kv_token"]
MEMORY_NAMES: Final[tuple[MemoryName, ...]] = get_args(MemoryName)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Relative(_Strict):
    """How much slower than the baseline a metric may be at the points that the glob `points` matches."""

    metric: str
    points: str = "*"
    max_slowdown: float = Field(gt=-1, le=100)
    floor: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.metric not in METRICS and self.metric != TIME:
            names = [*METRICS, TIME]
            raise ValueError(f"unknown metric '{self.metric}'; there are {', '.join(names)}{meant(self.metric, names)}")
        if self.floor and self.max_slowdown < 0:
            raise ValueError("a negative max_slowdown demands a gain, to which no floor applies")
        return self


class Objective(_Strict):
    """What a metric must keep in itself: a quantile over requests at most `max`, or a mean rate at least `min`."""

    metric: str
    points: str = "*"
    quantile: float = Field(default=0.95, gt=0, lt=1)
    max: float | None = Field(default=None, gt=0)
    min: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _known(self) -> Self:
        rates = [name for name, metric in METRICS.items() if metric.better == "higher"]
        if (self.max is None) == (self.min is None):
            raise ValueError("an objective has either `max` or `min`")
        if self.max is not None and self.metric not in REQUEST_METRICS:
            raise ValueError(f"`max` is for {', '.join(REQUEST_METRICS)}, not for '{self.metric}'")
        if self.min is not None and (self.metric not in rates or "quantile" in self.model_fields_set):
            raise ValueError(f"`min` is for the mean of {', '.join(rates)}")
        return self


class QualityBudget(_Strict):
    """Most perplexity over the baseline's, most KL divergence from it, least share of equal top tokens."""

    perplexity_ratio: float | None = Field(default=None, gt=0)
    kl_mean: float | None = Field(default=None, ge=0)
    kl_p99: float | None = Field(default=None, ge=0)
    same_top: float | None = Field(default=None, ge=0, le=1)


class Budgets(_Strict):
    """Everything a gate holds a candidate to."""

    schema_version: Literal[1] = 1
    relative: list[Relative] = Field(default_factory=list)
    objectives: list[Objective] = Field(default_factory=list)
    memory: dict[MemoryName, Annotated[float, Field(gt=-1)]] = Field(default_factory=dict)
    quality: QualityBudget = QualityBudget()

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not (self.relative or self.objectives or self.memory or self.quality.model_dump(exclude_none=True)):
            raise ValueError("there is no budget in it: give relative, objectives, memory or quality")
        return self


def slowdown_budgets(max_slowdown: float, metrics: tuple[str, ...]) -> Budgets:
    """Budgets that hold these metrics to one slow-down at every point. Raises ConfigError for an impossible one."""
    try:
        return Budgets(relative=[Relative(metric=metric, max_slowdown=max_slowdown) for metric in metrics])
    except ValidationError as error:
        raise ConfigError(f"--max-slowdown {max_slowdown}: {_first(error)}") from error


def load_budgets(path: Path) -> Budgets:
    """Read a budgets file. Raises ConfigError naming the file, the key and what is wrong with it."""
    document = read_yaml(path, ConfigError)
    try:
        return Budgets.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path} is no budgets file: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"])) or "the document"
    return f"{place}: {first['msg'].removeprefix('Value error, ')}"
