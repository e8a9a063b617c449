"""Small files that appear whole or not at all, and disks that are asked before."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from crepe_deploy.errors import DiskFullError, OutputError

DISK_MARGIN_BYTES = 64 << 20


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn write errors under `path`, the system's and those that safetensors words, into DiskFullError or OutputError.

    safetensors keeps the system's number in its text alone; what has none is not of the disk and goes on as it is.
    """
    try:
        yield
    except OSError as error:
        raise _write_error(path, error.errno, error) from error
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise _write_error(path, int(number[1]), error) from error
        raise


def _write_error(path: Path, number: int | None, error: Exception) -> DiskFullError | OutputError:
    if number in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return DiskFullError(f"the disk is full while writing {path}: free some room and run again")
    return OutputError(f"{path} cannot be written: {os.strerror(number) if number else error}")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 through a hidden file beside it, fsynced and renamed; its folder is made.

    Hidden files of processes that were killed in this go. Raises DiskFullError, OutputError.
    """
    if not path.name:
        raise OutputError(f"{path} is a folder: give the name of a file")
    partial = path.with_name(f".{path.name}.crepe-deploy-{os.getpid()}")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{glob.escape(path.name)}.crepe-deploy-*"):
                if not left.is_dir() and abandoned(left.name):
                    left.unlink(missing_ok=True)
            with partial.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def abandoned(name: str) -> bool:
    """Whether a temporary name, which ends with the number of its process, is of one that has ended."""
    number = name.rpartition("-")[2]
    if not number.isdecimal() or len(number) > 9:
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def clear(folder: Path, kept: Collection[str] = ()) -> None:
    """Remove everything in `folder` but what bears these names. Raises OutputError."""
    with disk_errors(folder):
        for path in list(folder.iterdir()):
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write JSON, indented, as `write_text` does."""
    write_text(path, to_json(content) + "\n")


def to_json(content: Any) -> str:
    """Indented JSON that every reader takes: NaN and infinity, which it has no numbers for, are null."""
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def require_disk(path: Path, size_bytes: int) -> None:
    """Raise DiskFullError unless the file system of `path` (which need not exist) has room for `size_bytes`."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size_bytes + DISK_MARGIN_BYTES:
        raise DiskFullError(
            f"{path} needs {_size(size_bytes)} and {_size(DISK_MARGIN_BYTES)} to spare, and its disk has {_size(free)} "
            "free: free some room"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def check_output_file(path: Path, *, overwrite: bool) -> Path:
    """Refuse a file that exists (unless `overwrite`) or cannot be written, and return it. Raises OutputError."""
    if path.exists() and not (overwrite and path.is_file()):
        raise OutputError(f"{path} exists: choose another --out" + ("" if path.is_dir() else ", or give --overwrite"))
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: {parent} is no folder that can be written to")
    return path
