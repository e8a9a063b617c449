"""Reading what pytest-benchmark saves: one JSON file, or a folder of files, each of which is one round.

Timings of one file follow each other, and neighbours in time are alike; so a file's timings are cut into blocks of
equal length, each of which is one round. Its figure is the first decile: a benchmark does the same work each time, so
what is above that is mostly other work on the machine.

A benchmark that times a control before each of its own calls and keeps it as `extra_info["control_s"]` is compared by
its ratio to that, which survives another machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...errors import ConfigError
from ..run.result import LONGEST, SHORTEST
from ..run.statistics import undisturbed
from .arms import Arm, Cell
from .budgets import TIME

BLOCKS: Final = 20
CONTROL: Final = "control_s"


@dataclass(frozen=True)
class Timings:
    """One benchmark's seconds in the order they were taken, and its control's before each of them."""

    data: list[float]
    control: list[float] | None


@dataclass(frozen=True)
class Saved:
    """One file: the machine, and timings by the benchmark's full name."""

    path: Path
    host: dict[str, Any]
    python: str
    commit: str | None
    timings: dict[str, Timings]


def is_pytest_json(document: Any) -> bool:
    """Whether a JSON document is one that pytest-benchmark wrote."""
    return isinstance(document, dict) and "benchmarks" in document and "machine_info" in document


def parse_saved(document: dict[str, Any], path: Path) -> Saved:
    """What such a document holds. Raises ConfigError for no benchmarks, no raw timings, or impossible ones.

    What it may know of the machine, the commit and each benchmark may be missing or null, as some plugins leave it.
    """
    machine = _object(document, "machine_info", path)
    cpu = _object(machine, "cpu", path)
    benchmarks = document["benchmarks"]
    if not isinstance(benchmarks, list) or not benchmarks:
        raise ConfigError(f"{path} holds no benchmark: was anything selected when it was written?")
    commit = _object(document, "commit_info", path).get("id")
    timings: dict[str, Timings] = {}
    for entry in benchmarks:
        name = entry.get("fullname") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name in timings:
            raise ConfigError(f"{path}: a benchmark has no `fullname`, or that of another one: {name!r:.80}")
        timings[name] = _timings(name, entry, path)
    return Saved(
        path=path,
        host={
            "cpu": cpu.get("brand_raw", cpu.get("brand")),  # its name before py-cpuinfo 6
            "cores": cpu.get("count"),
            "machine": machine.get("machine"),
        },
        python=str(machine.get("python_version")),
        commit=commit if isinstance(commit, str) else None,
        timings=timings,
    )


def _object(parent: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """An object of an object; empty where it is missing or null. Raises ConfigError for anything else."""
    value = parent.get(name)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{path}: {name} is {value!r:.80}, and not an object")
    return value or {}


def arm_of_file(saved: Saved) -> Arm:
    """A file as one side of a gate: a round for each block of timings."""
    cells = {
        (name, TIME): Cell("s", "lower", _blocks(timings.data), _blocks(timings.control) if timings.control else None)
        for name, timings in saved.timings.items()
    }
    requests = {(name, TIME): [[value] for value in timings.data] for name, timings in saved.timings.items()}
    return Arm(saved.path.name, cells, {"host": saved.host}, requests=requests, versions={"python": saved.python})


def arm_of_folder(folder: Path, files: Sequence[Saved]) -> Arm:
    """A folder's files as one side of a gate: a round for each file. Raises ConfigError where files disagree."""
    first = files[0]
    for other in files[1:]:
        if other.host != first.host or other.timings.keys() != first.timings.keys():
            raise ConfigError(f"{other.path} and {first.path} are of different machines or hold different benchmarks")
    cells, requests = {}, {}
    for name in first.timings:
        rounds = {index: undisturbed(saved.timings[name].data) for index, saved in enumerate(files)}
        cells[name, TIME] = Cell("s", "lower", rounds)
        requests[name, TIME] = [saved.timings[name].data for saved in files]
    facts = {"host": first.host, "workload": {"files": len(files)}}
    return Arm(folder.name, cells, facts, requests=requests, versions={"python": first.python}, paired=True)


def _timings(name: str, entry: dict[str, Any], path: Path) -> Timings:
    data = _object(entry, "stats", path).get("data")
    if not data:
        raise ConfigError(
            f"{path}: {name} has no raw timings: write the file with --benchmark-json, or add --benchmark-save-data"
        )
    control = _object(entry, "extra_info", path).get(CONTROL)
    for values in (data, data if control is None else control):
        if not isinstance(values, list) or not all(map(_is_time, values)):
            raise ConfigError(f"{path}: {name} has timings that are not positive numbers of seconds")
    if control is not None and len(control) != len(data):
        raise ConfigError(f"{path}: {name} has {len(data)} timings and {len(control)} of its control")
    return Timings(data, control)


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and SHORTEST <= value <= LONGEST


def _blocks(values: list[float]) -> dict[int, float]:
    parts = np.array_split(np.asarray(values), min(BLOCKS, len(values)))
    return {index: undisturbed(part.tolist()) for index, part in enumerate(parts)}
