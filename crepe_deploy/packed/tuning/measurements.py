"""The file of kernel measurements that dispatchers keep in the user's cache, one for each machine."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from crepe_deploy.errors import CheckpointError
from crepe_deploy.machine import cache_dir
from crepe_deploy.store.reading import read_json

VERSION: Final = 1
_LOG: Final = logging.getLogger("crepe_deploy")

Times = dict[str, float]
Timer = Callable[[Mapping[str, Callable[[], object]]], Times]
Machine = Mapping[str, str]


def path_of(machine: Machine) -> Path:
    """The file of the measurements that are valid for this machine and these versions."""
    digest = hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "plans" / f"{digest}.json"


def read(path: Path, machine: Machine, known: Callable[[str], bool]) -> dict[str, Times]:
    """The measurements in a file; empty when it is absent, damaged, of another version or machine.

    An entry counts only when `known` accepts the name of each of its choices and one of them is not `dense`.
    """
    try:
        content = read_json(path)
        if content["version"] != VERSION or content["machine"] != machine:
            return {}
        return {
            str(name): times
            for name, times in content["times_ms"].items()
            if all(map(known, times)) and set(times) - {"dense"} and all(ms > 0 for ms in times.values())
        }
    except (CheckpointError, TypeError, KeyError, AttributeError):
        return {}


def add(path: Path, machine: Machine, known: Callable[[str], bool], new: Mapping[str, Times]) -> None:
    """Add measurements to the file in one atomic step; a read-only cache is not an error."""
    content = {"version": VERSION, "machine": machine, "times_ms": read(path, machine, known) | dict(new)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
            json.dump(content, file, indent=1, sort_keys=True)
        Path(file.name).replace(path)
    except OSError as error:
        _LOG.warning("kernel measurements cannot be kept in %s: %s", path, error)
