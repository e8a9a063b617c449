"""Files of an output in the making: each that is whole is noted in the journal, so that a resumed run keeps it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from .journal import Journal
from .manifest import sha256_file

SHARD: Final = "shard"
FILE: Final = "file"
Noted = Callable[[str, Any], bool]


@dataclass(frozen=True)
class Pieces:
    """The files of one folder. of: by what they are known in the journal, where that has several folders."""

    journal: Journal
    of: str

    @property
    def names(self) -> set[str]:
        """Of the files that are noted, whatever has become of them."""
        keys = [*self.journal.keys(SHARD), *self.journal.keys(FILE)]
        return {key.removeprefix(f"{self.of}/") for key in keys if key.startswith(f"{self.of}/")}

    def shard(self, name: str, tensors: Collection[str], noted: Noted) -> dict[str, Any] | None:
        """`sha256` and `notes` of a shard's tensors; None where it is not noted. Raises ConfigError as `Journal`."""
        valid = partial(_is_shard, tensors=tensors, noted=noted)
        entry: dict[str, Any] | None = self.journal.get(SHARD, self._key(name), valid)
        return entry

    def note_shard(self, name: str, sha256: Mapping[str, str], notes: Mapping[str, Any]) -> None:
        """A shard is written. Raises DiskFullError."""
        self.journal.add(SHARD, self._key(name), {"sha256": dict(sha256), "notes": dict(notes)})

    def file(self, folder: Path, name: str, tensors: Collection[str] = ()) -> dict[str, str] | None:
        """Fingerprints of what a file holds, as they were noted; None where it was not, or is not what was noted.

        Raises ConfigError as `Journal.get` does.
        """
        entry = self.journal.get(FILE, self._key(name), partial(_is_file, tensors=tensors))
        path = folder / name
        if entry is None or path.is_symlink() or not path.is_file() or sha256_file(path) != entry["sha256"]:
            return None
        found: dict[str, str] = entry["tensors"]
        return found

    def note_file(self, name: str, sha256: str, tensors: Mapping[str, str] | None = None) -> None:
        """A file is written. tensors: their fingerprints. Raises DiskFullError."""
        self.journal.add(FILE, self._key(name), {"sha256": sha256, "tensors": dict(tensors or {})})

    def _key(self, name: str) -> str:
        return f"{self.of}/{name}"


def _is_shard(value: Any, tensors: Collection[str], noted: Noted) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"sha256", "notes"}
        and _are_hashes(value["sha256"], tensors)
        and isinstance(value["notes"], dict)
        and value["notes"].keys() <= set(tensors)
        and all(noted(name, value["notes"].get(name)) for name in tensors)
    )


def _is_file(value: Any, tensors: Collection[str]) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"sha256", "tensors"}
        and isinstance(value["sha256"], str)
        and _are_hashes(value["tensors"], tensors)
    )


def _are_hashes(value: Any, names: Collection[str]) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(names)
        and all(isinstance(digest, str) for digest in value.values())
    )
