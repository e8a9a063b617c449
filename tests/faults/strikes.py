"""Striking the file calls of a command, its libraries' too: event k of a run fails, or a signal comes there.

`strikes.c` is compiled once and must be loaded before the process starts: run what uses `arm` with `environment()`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import mmap
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_name("strikes.c")
KINDS: Final = {
    "ENOSPC": -errno.ENOSPC, "EIO": -errno.EIO, "EACCES": -errno.EACCES, "EDQUOT": -errno.EDQUOT,
    "SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGHUP": signal.SIGHUP,
}  # fmt: skip
_ARMED: Final[list[Counter]] = []  # the library writes into them until the process ends
LASTING: Final = {"ENOSPC", "EDQUOT"}  # a disk that is full stays so


@functools.cache
def library() -> Path:
    """The compiled library; made once for each state of its source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"crepe-deploy-strikes-{os.getuid()}-{digest}.so"
    if not place.exists():
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("g++")
        assert compiler, "a C compiler is needed"
        made = place.with_suffix(f".{os.getpid()}")
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-x", "c", "-o", str(made), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        made.rename(place)
    return place


def environment() -> dict[str, str]:
    """Variables of a process in which `arm` works."""
    return {**os.environ, "LD_PRELOAD": str(library())}


class Counter:
    """A number that a child and its parent share."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.cell = ctypes.c_long.from_buffer(self.memory)

    @property
    def value(self) -> int:
        """How many events there were."""
        return self.cell.value


def arm(root: Path, event: int, kind: str, counter: Counter) -> Callable[[], None]:
    """What arms the process that calls it: file event number `event` below `root` gets `kind`; 0: they are counted."""

    def strike() -> None:
        _ARMED.append(counter)
        how = KINDS[kind]
        loaded = ctypes.CDLL(None)
        loaded.strike_arm(
            os.fsencode(root), ctypes.c_long(event or -1), ctypes.c_long(how), int(kind in LASTING),
            ctypes.byref(counter.cell),
        )  # fmt: skip

    return strike
