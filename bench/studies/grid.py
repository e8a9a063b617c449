"""A grid of measurements in one results file: each cell is measured once, and a stopped grid goes on where it stopped.

    {"conditions": ..., "versions": ..., "commands": [...], "cells": {"ROW|AT|SEED": ...}, and what is measured once}

AT is what a grid varies besides its rows and seeds: a pattern, a sparsity.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...store.files import write_json
from ...store.manifest import sha256_file, versions
from ...store.reading import read_object

Cell = dict[str, Any]


def text_record(path: Path, name: str = "text") -> dict[str, str]:
    """What the conditions say of a text: its file name, under `name`, and its hash."""
    return {name: path.name, "sha256": sha256_file(path)}


def texts_record(paths: Sequence[Path]) -> dict[str, str]:
    """The same of one text, or of several that are mixed: their names, and the hash of their hashes."""
    if len(paths) == 1:
        return text_record(paths[0])
    hashes = "".join(sha256_file(path) for path in paths)
    return {
        "text": " + ".join(path.name for path in paths),
        "sha256": hashlib.sha256(hashes.encode()).hexdigest(),
    }


def cells_of(labels: Iterable[str], rows: str, places: str, seeds: str) -> Iterator[tuple[str, str, int]]:
    """Every (label, place, seed): places and seeds are lists with commas, rows a pattern that labels are searched for.

    All rows of a seed come before the next seed, all seeds of a place before the next place.
    """
    chosen = [label for label in labels if re.search(rows, label)]
    return ((label, at, int(seed)) for at in places.split(",") for seed in seeds.split(",") for label in chosen)


class ResultsFile:
    """What is in the file, and what is added to it.

    more: what a new file holds besides. Raises ConfigError where the file is from other conditions.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any], command: str, **more: Any) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "conditions": conditions, "versions": versions(), "commands": [], "cells": {}, **more,
        }  # fmt: skip
        if path.is_file():
            self.content = read_object(path)
            if self.content["conditions"] != conditions:
                differences = _differences(self.content["conditions"], conditions)
                raise ConfigError(
                    f"{path} was measured under other conditions ({differences}); give the same, or another --out"
                )
        if command not in self.content["commands"]:
            self.content["commands"].append(command)

    def _save(self) -> None:
        """Write the file, with what another run has added to it meanwhile."""
        if self.path.is_file():
            there = read_object(self.path)
            commands = list(dict.fromkeys([*there["commands"], *self.content["commands"]]))
            cells = {**there["cells"], **self.content["cells"]}
            self.content = {**there, **self.content, "commands": commands, "cells": cells}
        write_json(self.path, self.content)

    def once(self, name: str, measure: Callable[[], Any]) -> None:
        """Measure what is not of one cell, unless it is there."""
        if name not in self.content:
            self.content[name] = measure()
            self._save()

    def find(self, label: str, at: object, seed: int) -> Cell | None:
        """The cell, where it was measured."""
        cell: Cell | None = self.content["cells"].get(f"{label}|{at}|{seed}")
        return cell

    def cell(self, label: str, at: object, seed: int, measure: Callable[[], Cell]) -> tuple[Cell, str]:
        """The cell, measured unless it is there, and in words how long that took."""
        known = self.find(label, at, seed)
        if known is not None:
            return known, "measured before"
        made = self.content["cells"][f"{label}|{at}|{seed}"] = measure()
        self._save()
        return made, f"{made['seconds']} s"


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two sets of conditions, name by name."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return "; ".join(
        f"{name}: {json.dumps(there.get(name))} there, {json.dumps(here.get(name))} here" for name in names
    )
