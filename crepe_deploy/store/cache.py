"""What this tool keeps in its cache folder, one entry for each thing kept, and how it is removed.

An entry is known by its place and the form of its name. Whatever else lies there is nobody's business here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crepe_deploy.errors import CheckpointError
from crepe_deploy.machine import cache_dir

from .files import abandoned
from .reading import read_object

GGUF_CACHE: Final = "gguf-4"  # before 2 weights could be random, 3 rotary embeddings not stretched, 4 biases lost
PROVENANCE: Final = "gguf_source.json"
_SHA: Final = "[0-9a-f]{64}"
_HASH: Final = "[0-9a-f]{16}"
KINDS: Final = {  # by the folder inside the cache: the kind, and what the names of its entries look like
    r"gguf(-\d+)?": ("gguf", rf"{_SHA}(\.partial-\d+)?"),
    "self": ("text", rf"({_SHA}\.json|\.{_SHA}\.json\.crepe-deploy-\d+)"),
    "kernels": ("kernels", _HASH),
    "plans": ("speeds", rf"({_HASH}|tmp\w+)\.json"),
}
_WHAT: Final = {
    "gguf": "a GGUF file, dequantised",
    "text": "calibration text that a model wrote (--calib self)",
    "kernels": "CPU kernels, compiled for this machine",
    "speeds": "kernel speeds measured on this machine",
}


@dataclass(frozen=True)
class Kept:
    """One thing in the cache. kind: gguf, text, kernels or speeds. what: the same for a person. size: bytes."""

    kind: str
    what: str
    path: Path
    size: int


def kept() -> list[Kept]:
    """Everything of ours in the cache, by place."""
    found = []
    for place in _entries(cache_dir()):
        for folder, (kind, names) in KINDS.items():
            if re.fullmatch(folder, place.name) and not place.is_symlink():
                found += [
                    Kept(kind, _what(kind, path), path, _size(path))
                    for path in _entries(place)
                    if re.fullmatch(names, path.name) and not path.is_symlink()
                ]
    return found


def remove(entry: Kept) -> str | None:
    """Remove one entry; why it was left, or None where it is gone."""
    path = entry.path
    if not path.is_dir() and path.name.startswith(".") and not abandoned(path.name):
        return "a run is writing it"
    try:
        with _unused(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except BlockingIOError:
        return "a run is writing it"
    except OSError as error:
        return error.strerror or str(error)
    with contextlib.suppress(OSError):
        path.parent.rmdir()  # where it was the last
    return None


@contextlib.contextmanager
def _unused(path: Path) -> Iterator[None]:
    """Inside, a folder is locked as its writers lock it. Raises BlockingIOError where one is at work."""
    handles = []
    try:
        for place in (path, path / "lock") if path.is_dir() else ():
            if place.exists():
                handles.append(os.open(place, os.O_RDONLY | os.O_NOFOLLOW))
                fcntl.flock(handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        for handle in handles:
            os.close(handle)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _what(kind: str, path: Path) -> str:
    if kind != "gguf":
        return _WHAT[kind]
    if ".partial-" in path.name:
        return f"{_WHAT[kind]} in part"
    try:
        name = read_object(path / PROVENANCE).get("file")
    except CheckpointError:
        name = None
    old = "" if path.parent.name == GGUF_CACHE else ", of an older version: not read any more"
    return f"{name if isinstance(name, str) else 'a GGUF file'}, dequantised: read in its place{old}"


def _size(path: Path) -> int:
    files = [path] if not path.is_dir() else [inner for inner in path.rglob("*") if not inner.is_dir()]
    size = 0
    for file in files:
        with contextlib.suppress(OSError):
            size += file.lstat().st_size
    return size
