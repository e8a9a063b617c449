"""`OUT.work`: a run's folder for what a stopped one goes on from, emptied of its own and of nothing else."""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from crepe_deploy.errors import OutputError

from .files import disk_errors
from .signals import Uninterrupted

JOURNAL: Final = "journal.jsonl"
# The names that a structural search, and healing, give what they keep there.
OWN: Final = (JOURNAL, "iteration-*", "split", "shared", "final", "step-*", "best-*")


def work_folder(out: Path) -> Path:
    """Where a run for `out` keeps its journal, and what belongs to it, until it is done."""
    return out.parent / f"{out.name}.work"


def make_work_folder(work: Path, *, overwrite: bool) -> None:
    """Make the folder; with `overwrite`, what a stopped search left in it goes.

    Raises OutputError where something lies there that no search wrote.
    """
    strange = _strange(work)
    if strange is not None:
        raise OutputError(f"{strange} was not written by a search, which would work there: move it away")
    with disk_errors(work):
        if overwrite:
            remove_work_folder(work)
        work.mkdir(parents=True, exist_ok=True)


def remove_work_folder(work: Path) -> None:
    """Remove what a search wrote, and the folder where nothing else is in it."""
    for path in work.iterdir() if work.is_dir() else ():
        if _is_own(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    with contextlib.suppress(OSError):
        work.rmdir()


@contextlib.contextmanager
def removed_once_written(work: Path, out: Path) -> Iterator[None]:
    """Inside, `out` is written; then the work folder goes, also where a stop or an error comes in between.

    Nothing is left to resume by then. Raises OutputError.
    """
    before = _identity(out)
    try:
        yield
    except BaseException:
        if _identity(out) in (None, before):
            raise
        _remove(work)
        raise
    _remove(work)


def _remove(work: Path) -> None:
    with Uninterrupted(), disk_errors(work):
        remove_work_folder(work)


def _identity(folder: Path) -> int | None:
    return folder.stat().st_ino if folder.exists() else None


def _strange(work: Path) -> Path | None:
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        return work
    names = sorted(path.name for path in work.iterdir()) if work.exists() else []
    foreign = next((name for name in names if not _is_own(name)), None)
    if foreign is None and names and JOURNAL not in names:
        foreign = names[0]
    return None if foreign is None else work / foreign


def _is_own(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in OWN)
