"""What runs below a process, and waiting until it has gone."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from crepe_deploy.serve.keeper import descendants

HANG_S = 3600  # ends a test that hangs; a busy machine is no failure


def below(process: int) -> set[int]:
    """The processes that it started, and that these started."""
    return set(descendants(process))


def running(processes: Iterable[int]) -> set[int]:
    """Those that still run; who is dead and not asked for does not."""
    found = set()
    for number in processes:
        try:
            state = Path(f"/proc/{number}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state != "Z":
            found.add(number)
    return found


def wait_until_gone(processes: Iterable[int]) -> None:
    """Return when none of them runs."""
    end = time.monotonic() + HANG_S
    while left := running(processes):
        assert time.monotonic() < end, {number: Path(f"/proc/{number}/cmdline").read_bytes() for number in left}
        time.sleep(0.05)
