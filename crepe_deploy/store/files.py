"""Small files that appear whole or not at all, and disks that are asked before."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crepe_deploy.errors import DiskFullError, OutputError

DISK_MARGIN_BYTES = 64 << 20


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's write errors under `path` into DiskFullError or OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise DiskFullError(f"the disk is full while writing {path}: free some room and run again") from error
        raise OutputError(f"{path} cannot be written: {error}") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON through a temporary file, fsynced and renamed."""
    partial = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def require_disk(path: Path, size_bytes: int) -> None:
    """Raise DiskFullError unless the file system of `path` (which need not exist) has room for `size_bytes`."""
    place = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < size_bytes + DISK_MARGIN_BYTES:
        raise DiskFullError(
            f"{path} needs {size_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free: free some room"
        )
