"""Output folders that appear whole or not at all, and never at the cost of a file that is not ours.

A run that writes OUT works in `OUT.partial` and renames it at the end; an OUT that is replaced steps aside to `OUT.old`
for a moment. A hidden record beside OUT, `.OUT.crepe-deploy`, is locked while the run lives and says which of these
folders it made, by device and inode: a later run removes, or puts back, exactly those, and refuses whatever else bears
such a name. Only a folder that this tool wrote is replaced, and only when nothing else lies in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

from crepe_deploy.errors import OutputError

from .files import disk_errors
from .signals import Uninterrupted

# Folders beside OUT that belong to the run that writes it.
DERIVED: Final = (".partial", ".old", ".work", ".failed", ".unpacked")
MANIFEST: Final = "manifest.json"
REPORT: Final = "report.json"
_RECORD_BYTES: Final = 1 << 16
_JSON_BYTES: Final = 1 << 28


def check_output(out: Path, *, overwrite: bool, inputs: tuple[Path, ...] = (), own: tuple[str, ...] = ()) -> None:
    """Refuse an output that cannot be written without harm. Raises OutputError.

    That is one that exists (unless `overwrite`, and then where this tool did not write all of it), equals an input,
    lies around or inside one, or whose working folders would. own: as of `foreign`.
    """
    place = resolved(out)
    if not place.name:
        raise OutputError(f"output {out} is the root of the file system: choose a folder")
    for path in inputs:
        source = resolved(path)
        for name in (place, *(place.with_name(place.name + suffix) for suffix in DERIVED)):
            if name == source or source.is_relative_to(name) or name.is_relative_to(source):
                what = f"output {out}" if name == place else f"{name}, which a run for output {out} works in,"
                raise OutputError(f"{what} and input {path} are one folder or lie inside each other; choose another")
    if out.is_symlink():
        raise OutputError(f"{out} is a link, and links are not replaced: give another --out, or what it points to")
    if out.exists():
        _check_existing(out, overwrite, own)
    if not os.access(next(parent for parent in place.parents if parent.exists()), os.W_OK):
        raise OutputError(f"{out} cannot be created: its parent folder is not writable")


def resolved(path: Path) -> Path:
    """A path without its links. Raises OutputError where they lead in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{path} cannot be looked for: {error}") from error


def _check_existing(out: Path, overwrite: bool, own: tuple[str, ...]) -> None:
    if not out.is_dir():
        raise OutputError(f"{out} exists and is not a folder")
    if not overwrite:
        raise OutputError(f"{out} exists: give another --out, or --overwrite to replace it")
    if Path.cwd().resolve().is_relative_to(out.resolve()):
        raise OutputError(f"{out} is the folder that this command runs in, which cannot be replaced from inside")
    strange = foreign(out, own)
    if strange:
        names = ", ".join(strange[:3]) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
        raise OutputError(
            f"{out} holds what crepe-deploy did not write ({names}), so --overwrite does not replace it: move that "
            "away, or give another --out"
        )


def foreign(folder: Path, own: tuple[str, ...] = ()) -> list[str]:
    """The names in `folder`, relative to it, that no manifest or report of ours accounts for; sorted.

    own: patterns of further names that are ours, for a folder of a kind that has neither.
    """
    known = _known(folder)
    return sorted(
        name
        for path in folder.rglob("*")
        if (path.is_symlink() or not path.is_dir())
        and (name := path.relative_to(folder).as_posix()) not in known
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in own)
    )


def _known(folder: Path, inside: str = "") -> set[str]:
    """Files that our own records in `folder` and the folders right in it account for, relative to the outermost."""
    known: set[str] = set()
    manifest, report = _ours(folder / MANIFEST), _ours(folder / REPORT)
    if manifest is not None and isinstance(manifest.get("files"), dict):
        known |= {f"{inside}{name}" for name in (MANIFEST, *manifest["files"])}
    if report is not None:
        known.add(f"{inside}{REPORT}")
    if not inside and report is not None:
        for child in folder.iterdir():
            if child.is_dir() and not child.is_symlink():
                known |= _known(child, f"{child.name}/")
    return known


def _ours(path: Path) -> dict[str, Any] | None:
    """A JSON document of this tool, or None for anything else."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _JSON_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) and "crepe-deploy" in content.get("versions", ()) else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


@contextlib.contextmanager
def atomic_folder(out: Path, *, overwrite: bool = False, own: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield `OUT.partial/`, renamed to `out` on success and removed on any failure, Ctrl-C included.

    What a killed run left of its own is put back or removed first. own: as of `foreign`.
    Raises OutputError, DiskFullError.
    """
    partial = out.with_name(out.name + ".partial")
    with Uninterrupted() as signals, parents(out), claimed(out) as claim:
        claim.recover()
        check_output(out, overwrite=overwrite, own=own)
        try:
            claim.make(partial)
            with signals.delivered():
                yield partial
            with disk_errors(out):
                claim.publish(partial)
        finally:
            claim.recover()


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """Inside, `out`, a folder or a file, is this run's to write: another run for it is refused at once.

    An `atomic_folder` or `unfinished` for it inside is under the same hold. Raises OutputError, DiskFullError.
    """
    if not out.name:
        raise OutputError(f"output {out} has no name: choose one")
    with Uninterrupted() as signals, parents(out), Claim(out) as claim:
        token = _HELD.set({**_HELD.get(), _place(out): claim})
        try:
            with signals.delivered():
                yield
        finally:
            _HELD.reset(token)


@contextlib.contextmanager
def scratch_folder(place: Path) -> Iterator[Path]:
    """Yield the new, empty folder `place`, removed at the end whatever happens, at the latest by the next run.

    Raises OutputError where something bears its name.
    """
    with Uninterrupted() as signals, Claim(place) as claim:
        claim.recover()
        try:
            claim.make(place)
            with signals.delivered():
                yield place
        finally:
            claim.recover()


def free_name(place: Path) -> Path:
    """`place`, or with -2, -3, ... behind it the first name that nothing bears yet."""
    numbered = (place.with_name(f"{place.name}-{number}") for number in itertools.count(2))
    return next(name for name in itertools.chain([place], numbered) if not name.exists() and not name.is_symlink())


_HELD: ContextVar[Mapping[Path, Claim]] = ContextVar("_HELD", default={})  # noqa: B039 - never changed in place


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[Claim]:
    """A claim on `out`: that of the `held` around it where there is one, which nothing inside shares. OutputError."""
    place, others = _place(out), dict(_HELD.get())
    claim = others.pop(place, None)
    if claim is None:
        with Claim(out) as claim:
            yield claim
        return
    token = _HELD.set(others)
    try:
        yield claim
    finally:
        _HELD.reset(token)


def _place(out: Path) -> Path:
    return resolved(out.absolute().parent) / out.name


class Claim:
    """One run's hold on an output: a locked record beside it of the folders that the run made.

    Raises OutputError where another run holds it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(f".{out.name}.crepe-deploy")
        self._handle = -1
        self._folders: dict[str, list[int]] = {}

    def __enter__(self) -> Claim:
        with disk_errors(self.path):
            while True:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    os.close(handle)
                    raise OutputError(
                        f"another run is writing {self.out}: wait for it, or give another --out"
                    ) from error
                if self.path.exists() and os.fstat(handle).st_ino == self.path.stat().st_ino:
                    break  # else: its last holder removed it between our two calls
                os.close(handle)
        self._handle = handle
        self._folders = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._folders:
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(self._handle)

    def make(self, folder: Path) -> None:
        """Make an empty folder that is recorded as ours. Raises OutputError where something bears its name."""
        self._folders[folder.name] = []  # to be made: a kill before its identity is noted leaves it empty
        self._write()
        with disk_errors(folder):
            try:
                folder.mkdir()
            except FileExistsError as error:
                del self._folders[folder.name]
                self._write()
                raise OutputError(
                    f"{folder} exists and was not made by a run for {self.out}: move it away, or give another --out"
                ) from error
            self._note(folder, folder)

    def publish(self, partial: Path) -> None:
        """Rename `partial` to the output, an older one first aside to `OUT.old`; `recover` finishes what is cut off."""
        for record in partial.rglob(".*.crepe-deploy"):  # of a claim inside that could not remove it
            record.unlink()
        old = self.out.with_name(self.out.name + ".old")
        if self.out.exists():
            if old.exists() or old.is_symlink():
                raise OutputError(f"{old} exists and was not made by a run for {self.out}: move it away and run again")
            self._note(old, self.out)
            self.out.rename(old)
        partial.rename(self.out)
        _sync(self.out.parent)

    def recover(self) -> None:
        """Put back the older output where no newer one took its place, and remove the other folders of ours."""
        old = self.out.with_name(self.out.name + ".old")
        if self._is_ours(old) and not self.out.exists():
            with disk_errors(self.out):
                old.rename(self.out)
        for name in list(self._folders):
            folder = self.out.with_name(name)
            if not self._folders[name]:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if self._is_ours(folder):
                shutil.rmtree(folder, ignore_errors=True)
            if not self._is_ours(folder):
                del self._folders[name]
        if self._folders:  # else the record goes: what is done must not fail for want of room to say so
            self._write()

    def _is_ours(self, folder: Path) -> bool:
        """Whether the folder at this name is the very one that was recorded."""
        if folder.is_symlink() or not folder.is_dir():
            return False
        return self._folders.get(folder.name) == _identity(folder)

    def _note(self, folder: Path, present: Path) -> None:
        """Record that the folder which is now at `present` is ours as `folder`."""
        self._folders[folder.name] = _identity(present)
        self._write()

    def _read(self) -> dict[str, list[int]]:
        try:
            content = json.loads(os.pread(self._handle, _RECORD_BYTES, 0) or b"{}")
            folders = content["folders"] if content else {}
            names = {self.out.name + suffix for suffix in ("", *DERIVED)}
            return {name: [int(part) for part in folders[name]] for name in names & folders.keys()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}  # cut off while it was written: then nothing is known to be ours

    def _write(self) -> None:
        content = json.dumps({"tool": "crepe-deploy", "output": self.out.name, "folders": self._folders}).encode()
        with disk_errors(self.path):
            os.pwrite(self._handle, content.ljust(os.fstat(self._handle).st_size), 0)
            os.fsync(self._handle)


def _identity(folder: Path) -> list[int]:
    status = folder.stat()
    return [status.st_dev, status.st_ino]


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def parents(out: Path) -> Iterator[None]:
    """Inside, the folders above `out` exist; those made for it go again where they stayed empty."""
    missing = [parent for parent in out.absolute().parents if not parent.exists()]
    with disk_errors(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
