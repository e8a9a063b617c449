"""Folders that hold a run's work meanwhile, named after its process: a later run removes those of killed ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .files import abandoned, disk_errors


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Yield a new folder in the system's place for temporary ones, removed at the end.

    Those of this user's killed processes go first; a living one holds a lock. Raises OutputError, DiskFullError.
    """
    prefix = f"crepe-deploy-{purpose}-"
    remove_abandoned(Path(tempfile.gettempdir()), f"{prefix}*")
    with disk_errors(Path(tempfile.gettempdir())):
        made = tempfile.TemporaryDirectory(prefix=prefix, suffix=f"-{os.getpid()}", ignore_cleanup_errors=True)
    with made as name, held(Path(name)):
        yield Path(name)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, `folder` is locked, so that no other run takes it for abandoned. Raises OutputError, DiskFullError."""
    with disk_errors(folder):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def remove_abandoned(place: Path, pattern: str) -> None:
    """Remove the folders in `place` whose names match and end with the number of a process that has ended."""
    for left in place.glob(pattern):
        if abandoned(left.name):
            _remove_unlocked(left)


def _remove_unlocked(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return  # another user's, a link, or gone by now
    try:
        if os.fstat(handle).st_uid == os.getuid():
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return  # it lives, where process numbers mean others than here
    finally:
        os.close(handle)
