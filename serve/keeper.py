"""Ties a server's life to ours: `python -IS keeper.py COMMAND ...`, its standard input a pipe that the parent holds.

When the pipe ends, because the parent closed it or died, of whatever signal, the command is asked to end; then it and
everything that it started is killed, whichever process group or session they moved to. When the command ends by itself
nothing of it stays either. Standard library only and run as a file, so that it starts at once and stays small. Finding
what was started takes Linux; elsewhere only the command itself is ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

GRACE_S: Final = 5.0
POLL_S: Final = 0.2
_PASSED_ON: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_LINUX: Final = sys.platform == "linux"


def main(command: list[str]) -> int:
    """Run the command until it ends or our parent does; its exit code, 128 + n where signal n ended it."""
    us = os.getpid()
    control: Any = ctypes.CDLL(None).prctl if _LINUX else lambda *_: 0
    control(_PR_SET_CHILD_SUBREAPER, 1)  # what loses its parent becomes our child, so that it is found

    def tie() -> None:
        control(_PR_SET_PDEATHSIG, signal.SIGKILL)  # should we be killed ourselves
        if os.getppid() != us:
            os._exit(1)

    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=tie)
    for number in _PASSED_ON:
        signal.signal(number, lambda number, _: process.send_signal(number))
    while process.poll() is None:
        if select.select([0], [], [], POLL_S)[0]:  # nothing is ever written: the pipe has ended
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            process.kill()
            process.wait()
    while left := list(descendants(us)):
        for each in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def descendants(process: int) -> Iterator[int]:
    """The processes below this one, the dead that nobody has asked for included."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(folder.name))
    pending = [process]
    while pending:
        below = children.get(pending.pop(), [])
        pending += below
        yield from below


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
