"""What every section of a chapter needs: the comparison, the runs behind it, and words for conditions."""

from __future__ import annotations

from dataclasses import dataclass

from ..run.result import Point, Run
from .compare import Comparison
from .loading import Group
from .numbers import count, plural


@dataclass(frozen=True)
class Scene:
    """A chapter in the making. `prefix` starts the names of its figures and tables. `context`: KV-cache tokens."""

    prefix: str
    group: Group
    comparison: Comparison
    context: int

    @property
    def run(self) -> Run:
        return self.comparison.run

    def name(self, word: str) -> str:
        """The name of a figure or table, unique in the report."""
        return f"{self.prefix}{word}"

    @property
    def machine(self) -> str:
        """The machine and how it was used, for captions."""
        environment = self.run.environment
        host = environment.host
        device = ", ".join(host.gpu) if host.gpu else f"{host.cpu} ({host.isa})"
        return f"{device}, {plural(environment.threads, 'thread')}, {self.dtype}"

    @property
    def dtype(self) -> str:
        """The number format that was asked for; where that was the engine's choice, what the baseline ran in."""
        asked = self.run.workload.dtype
        chosen = self.comparison.baseline.candidate.notes.get("dtype")
        return f"dtype {chosen} ({asked})" if asked == "auto" and isinstance(chosen, str) else f"dtype {asked}"

    def at(self, point: Point | None) -> str:
        """A point and the machine, for captions."""
        return self.machine if point is None else f"{describe(point)}; {self.machine}"


def describe(point: Point) -> str:
    """A workload point in words."""
    load = f"batch {point.batch}"
    if point.concurrency is not None:
        load = f"{plural(point.concurrency, 'request')} in flight against a server"
    return f"{point.name}: {load}, {count(point.prompt_tokens)} prompt + {count(point.output_tokens)} output tokens"
