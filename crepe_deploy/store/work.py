"""`OUT.work`: a run's folder for what a stopped one goes on from, emptied of its own and of nothing else.

`unfinished` is for runs whose output is made there piece by piece, beside the journal of the pieces that are done.
"""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from crepe_deploy.errors import CheckpointError, NumericalError, OutputError

from .files import disk_errors
from .folders import check_output, claimed, parents
from .journal import Journal, is_begun, open_journal
from .signals import Uninterrupted

JOURNAL: Final = "journal.jsonl"
OUTPUT: Final = "output"
PRUNED: Final = "pruned"
LAYER_DONE: Final = "levels.json"  # the last file of a layer of a structural search's supernet
_UNMADE: Final = f".{JOURNAL}.crepe-deploy-*"  # a journal whose making was cut off
# The names that runs give what they keep there: a structural search, healing, measured experts, pruning, and pruning
# before exports.
OWN: Final = (
    JOURNAL, _UNMADE, "iteration-*", "split", "shared", "final", "repaired", "step-*", "best-*", OUTPUT, f"{OUTPUT}.*",
    f".{OUTPUT}.*", "layer-*", "hidden-*", PRUNED,
    f"{PRUNED}-healed", f"{PRUNED}*.work", f"{PRUNED}*.partial", f"{PRUNED}*.old", f".{PRUNED}*.crepe-deploy",
)  # fmt: skip


@dataclass(frozen=True)
class Unfinished:
    """folder: what becomes the output. journal: of its finished pieces. work: both, and what else a run keeps."""

    folder: Path
    journal: Journal
    work: Path


@contextlib.contextmanager
def unfinished(
    out: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool, own: tuple[str, ...] = ()
) -> Iterator[Unfinished]:  # fmt: skip
    """Yield what a run makes `out` in, as it was left with `resume`, else empty; whole at the end, it becomes `out`.

    identity: what must be equal for a run to go on. own: as of `folders.foreign`. Where it does not come to its end,
    what has a finished piece stays; but of what is the model's own fault, and would come again, nothing is left.
    Meanwhile nobody else writes `out`.
    Raises OutputError and ConfigError as `open_journal` does, DiskFullError.
    """
    work = work_folder(out)
    with Uninterrupted() as signals, parents(out), claimed(out) as claim:
        claim.recover()
        check_output(out, overwrite=overwrite, own=own)
        journal = begin(work, identity, resume=resume, overwrite=overwrite)
        folder = work / OUTPUT
        try:
            with disk_errors(folder):
                folder.mkdir(exist_ok=True)
            with signals.delivered():
                yield Unfinished(folder, journal, work)
            with disk_errors(out):
                claim.publish(folder)
        except BaseException as error:
            if not len(journal) or not folder.exists() or isinstance(error, NumericalError | CheckpointError):
                remove_work_folder(work)
            raise
        finally:
            claim.recover()
        with disk_errors(work):
            remove_work_folder(work)


def _begun(work: Path) -> bool:
    """Whether a run has finished a piece there: in its journal, or a layer of a supernet."""
    return is_begun(work / JOURNAL) or any(work.glob(f"*/layer-*/{LAYER_DONE}"))


def work_folder(out: Path) -> Path:
    """Where a run for `out` keeps its journal, and what belongs to it, until it is done."""
    return out.parent / f"{out.name}.work"


def begin(work: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Journal:
    """The journal of a run in `work`, which is made, or found with `resume`; what has no finished piece is made anew.

    Raises OutputError as `make_work_folder`, that and ConfigError as `open_journal` does.
    """
    begun = _begun(work)
    if not resume:
        make_work_folder(work, overwrite=overwrite or not begun)
    return open_journal(work / JOURNAL, identity, resume=resume, overwrite=overwrite, begun=begun)


def make_work_folder(work: Path, *, overwrite: bool) -> None:
    """Make the folder; with `overwrite`, what a stopped run left in it goes.

    Raises OutputError where something lies there that no run wrote.
    """
    strange = _strange(work)
    if strange is not None:
        raise OutputError(f"{strange} was not written by a run, which would work there: move it away")
    with disk_errors(work):
        if overwrite:
            remove_work_folder(work)
        work.mkdir(parents=True, exist_ok=True)


def remove_work_folder(work: Path) -> None:
    """Remove what a run wrote, its journal last, and the folder where nothing else is in it."""
    for path in sorted(work.iterdir(), key=lambda path: path.name == JOURNAL) if work.is_dir() else ():
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


@contextlib.contextmanager
def unfinished_file(out: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[Journal]:
    """Yield the journal of a run that writes the file `out` inside, whole, once it is done; then the journal goes.

    identity: as of `unfinished`. Where the run does not come to its end and has a finished piece, the journal stays.
    Raises OutputError and ConfigError as `open_journal` does.
    """
    work = work_folder(out)
    journal = begin(work, identity, resume=resume, overwrite=overwrite)
    try:
        with removed_once_written(work, out):
            yield journal
    finally:
        if not len(journal):
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
    if foreign is None and JOURNAL not in names:
        foreign = next((name for name in names if not fnmatch.fnmatchcase(name, _UNMADE)), None)
    return None if foreign is None else work / foreign


def _is_own(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in OWN)
