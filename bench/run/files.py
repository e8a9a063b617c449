"""Small text files that appear whole or not at all, without the weight of a checkpoint's writer."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from ...errors import DiskFullError, OutputError


def write_text(path: Path, text: str) -> None:
    """Write through a temporary file beside it, fsynced and renamed; folders are made.

    Raises DiskFullError, OutputError.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise DiskFullError(f"the disk is full while writing {path}: free some room and run again") from error
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
