"""What a gate says: a verdict of rows, each with a status and a reason. Every output is made from this one object."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from ..run.result import Interval
from .arms import Gate

Status = Literal["PASS", "FAIL", "INCONCLUSIVE", "INVALID"]
Check = Literal["errors", "lengths", "host", "workload", "model", "objective", "latency", "memory", "quality"]
Comparison = Literal["paired by round", "ratios to each run's own control", "unpaired"]

SEVERITY: Final[tuple[Status, ...]] = ("INVALID", "FAIL", "INCONCLUSIVE", "PASS")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Record):
    """One check. `value`: a ratio (above 1: worse than the baseline) or a figure in `unit`; `limit`: what it may be.

    baseline, measured: the two arms' own figures, in the metric's unit, where they are comparable. rounds: the fewest
    of either arm. noise: half-width of an A/A log-ratio. p: one-sided, after Holm's correction.
    """

    candidate: str
    check: Check
    metric: str
    status: Status
    reason: str
    point: str | None = None
    comparison: Comparison | None = None
    value: Interval | None = None
    limit: float | None = None
    unit: str = "ratio"
    baseline: float | None = None
    measured: float | None = None
    rounds: int | None = None
    noise: float | None = None
    p: float | None = None

    @property
    def place(self) -> str:
        """What was checked: the point and the metric."""
        return " ".join(part for part in (self.point, self.metric) if part)


class Verdict(_Record):
    """What a gate found. `looks`: how often the data may be looked at; `level`: of each look's intervals."""

    schema_version: Literal[1] = 1
    kind: Literal["crepe-deploy-verdict"] = "crepe-deploy-verdict"
    gate: Gate
    status: Status
    baseline: str
    candidates: list[str]
    level: float
    looks: int
    rows: list[Row]
    notes: list[str]

    def count(self, status: Status) -> int:
        """How many rows have this status."""
        return sum(row.status == status for row in self.rows)

    def worst(self) -> Row:
        """The first row that has the verdict's own status."""
        return next(row for row in self.rows if row.status == self.status)

    @property
    def more_rounds_may_decide(self) -> bool:
        """Whether it is inconclusive for a reason that further rounds can remove."""
        undecided = [row for row in self.rows if row.status == "INCONCLUSIVE"]
        return self.status == "INCONCLUSIVE" and any(row.check in ("latency", "objective") for row in undecided)
