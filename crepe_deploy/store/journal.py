"""The journal of a search: every evaluated setting, one JSON document a line, so that a stopped search goes on.

The first line says which search it is. A search looks a setting up before it evaluates it, and everything between
evaluations is deterministic, so a resumed search ends where an uninterrupted one would.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crepe_deploy.errors import ConfigError, OutputError

from .files import disk_errors

VERSION = 1


class Journal:
    """Results by (kind, key), appended to a file as they come. Not for several processes at once."""

    def __init__(self, path: Path, entries: dict[tuple[str, str], Any]) -> None:
        self.path = path
        self._entries = entries

    def get(self, kind: str, key: str) -> Any | None:
        """What was recorded, or None."""
        return self._entries.get((kind, key))

    def add(self, kind: str, key: str, value: Any) -> None:
        """Record a result and hand it to the system at once. Raises DiskFullError."""
        self._entries[kind, key] = value
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "key": key, "value": value}) + "\n")

    def __len__(self) -> int:
        return len(self._entries)


def open_journal(path: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool = False) -> Journal:
    """Start a journal, or with `resume` go on with the one at `path`, which must be of the same search.

    A last line without its end, as a killed process leaves it, is cut off and evaluated again. Raises OutputError if
    there is one and neither flag is given, ConfigError naming what is missing, damaged or different.
    """
    header = {"version": VERSION, **identity}
    if resume:
        return Journal(path, _read(path, header))
    if path.exists() and not overwrite:
        raise OutputError(f"{path} holds an unfinished search: go on with --resume, or start anew with --overwrite")
    with disk_errors(path):
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
    return Journal(path, {})


def _read(path: Path, header: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    if not path.is_file():
        raise ConfigError(f"nothing to resume: there is no journal {path}")
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.split(b"\n")[:-1]
    if not lines:
        raise ConfigError(f"journal {path} is damaged: it has no complete line; start anew with --overwrite")
    _check_header(path, _parse(path, 1, lines[0]), header)
    entries: dict[tuple[str, str], Any] = {}
    for number, line in enumerate(lines[1:], start=2):
        document = _parse(path, number, line)
        if sorted(document) != ["key", "kind", "value"]:
            raise ConfigError(f"journal {path} is damaged: line {number} is no result; start anew with --overwrite")
        entries[document["kind"], document["key"]] = document["value"]
    if len(whole) < len(data):
        with disk_errors(path):
            os.truncate(path, len(whole))
    return entries


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"journal {path} is damaged: line {number} is not JSON; start anew with --overwrite"
        ) from error
    if not isinstance(document, dict):
        raise ConfigError(f"journal {path} is damaged: line {number} is no object; start anew with --overwrite")
    return document


def _check_header(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    expected = json.loads(json.dumps(wanted))
    for name in sorted(set(found) | set(expected)):
        if found.get(name) != expected.get(name):
            raise ConfigError(
                f"journal {path} is of another search: its {name} is {found.get(name)!r}, this one's "
                f"{expected.get(name)!r}; use the same options, or --overwrite"
            )
