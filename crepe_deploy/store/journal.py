"""The journal of a long run: every finished piece, one JSON document a line, so that a stopped run goes on.

The first line says which run it is, with the libraries' versions. A run looks a piece up before it does it, and
everything between pieces is deterministic, so a resumed run ends where an uninterrupted one would.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crepe_deploy.errors import ConfigError, OutputError
from crepe_deploy.limits import MOST_WHOLE

from .files import disk_errors, write_text
from .manifest import versions
from .reading import parse_json, read_bytes

VERSION = 1
LARGEST = {int: MOST_WHOLE, float: 1e30}


class Journal:
    """Results by (kind, key), appended to a file as they come. Not for several processes at once.

    lines: where in the file each of `entries` was read.
    """

    def __init__(
        self, path: Path, entries: dict[tuple[str, str], Any], lines: Mapping[tuple[str, str], int] | None = None
    ) -> None:
        self.path = path
        self._entries = entries
        self._lines = lines or {}

    def get(self, kind: str, key: str, valid: Callable[[Any], bool] = lambda _: True) -> Any | None:
        """What was recorded, or None. Raises ConfigError naming the line of what was read and is not `valid`."""
        value = self._entries.get((kind, key))
        if (line := self._lines.get((kind, key))) is not None and not valid(value):
            raise ConfigError(
                f"journal {self.path} is damaged: line {line} is no result of {kind} that this run could have; "
                "start anew with --overwrite"
            )
        return value

    def add(self, kind: str, key: str, value: Any) -> None:
        """Record a result and hand it to the system at once. Raises DiskFullError."""
        self._entries[kind, key] = value
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "key": key, "value": value}) + "\n")

    def last(self, kind: str, valid: Callable[[Any], bool]) -> tuple[str, Any] | None:
        """The key and the value of the newest result of a kind; None without one. Raises ConfigError as `get` does."""
        keys = self.keys(kind)
        return (keys[-1], self.get(kind, keys[-1], valid)) if keys else None

    def keys(self, kind: str) -> list[str]:
        """Of all results of a kind."""
        return [key for of, key in self._entries if of == kind]

    def __len__(self) -> int:
        return len(self._entries)


def is_begun(path: Path) -> bool:
    """Whether there is a journal with a finished piece, or a part of its line, whosoever's it is."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return len(file.readlines(1 << 16)) > 1


def numbers(value: Any, count: int | None = None) -> bool:
    """Whether a value read from a journal is a list of `count` numbers, none of them beyond measure; None: of any."""
    return (
        isinstance(value, list)
        and (count is None or len(value) == count)
        and all(type(one) in LARGEST and abs(one) <= LARGEST[type(one)] for one in value)
    )


def open_journal(
    path: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool = False, begun: bool = False
) -> Journal:  # fmt: skip
    """Start a journal, or with `resume` go on with the one at `path`, which must be of the same search.

    A last line without its end, as a killed process leaves it, is cut off and evaluated again. begun: pieces lie
    elsewhere. Raises OutputError if there are any and neither flag is given, ConfigError naming what is missing,
    damaged or different.
    """
    header = {"version": VERSION, "versions": versions(), **identity}
    if resume:
        return Journal(path, *_read(path, header))
    if not overwrite and (begun or is_begun(path)):
        raise OutputError(f"{path} holds an unfinished run: go on with --resume, or start anew with --overwrite")
    write_text(path, json.dumps(header) + "\n")  # whole or not at all: a stop would go on from it
    return Journal(path, {})


def _read(path: Path, header: Mapping[str, Any]) -> tuple[dict[tuple[str, str], Any], dict[tuple[str, str], int]]:
    if not path.exists():
        raise ConfigError(f"nothing to resume: there is no journal {path}")
    data = read_bytes(path, ConfigError)
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    if not lines:
        raise ConfigError(f"journal {path} is damaged: it has no complete line; start anew with --overwrite")
    _check_header(path, _parse(path, 1, lines[0]), header)
    entries: dict[tuple[str, str], Any] = {}
    places: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines[1:], start=2):
        document = _parse(path, number, line)
        kind, key = document.get("kind"), document.get("key")
        if sorted(document) != ["key", "kind", "value"] or not isinstance(kind, str) or not isinstance(key, str):
            raise ConfigError(f"journal {path} is damaged: line {number} is no result; start anew with --overwrite")
        entries[kind, key], places[kind, key] = document["value"], number
    if len(whole) < len(data):
        with disk_errors(path):
            os.truncate(path, len(whole))
    return entries, places


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        document = parse_json(line, f"line {number}", ConfigError, lenient=True)
    except ConfigError as error:
        raise ConfigError(f"journal {path} is damaged: {error}; start anew with --overwrite") from error
    if not isinstance(document, dict):
        raise ConfigError(f"journal {path} is damaged: line {number} is no object; start anew with --overwrite")
    return document


def _check_header(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    expected = parse_json(json.dumps(wanted), path, ConfigError, lenient=True)
    for name in sorted(set(found) | set(expected)):
        if found.get(name) != expected.get(name):
            raise ConfigError(
                f"journal {path} is of another run: its {name} is {_short(found.get(name))}, this one's "
                f"{_short(expected.get(name))}; use the same options, or --overwrite"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:297]}..."
