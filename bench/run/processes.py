"""Running the command line as a user would, and measuring the process: seconds and peak resident memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import CrepeError


@dataclass(frozen=True)
class Finished:
    """A finished process: its JSON output, wall-clock seconds, peak resident bytes and seconds of processor time.

    Bytes and processor time are of that process alone.
    """

    output: Any
    seconds: float
    peak_bytes: int
    cpu_seconds: float


def run_json(command: Sequence[str], env: dict[str, str] | None = None) -> Finished:
    """Run `command`, which prints one JSON document on stdout; stderr passes through. Raises CrepeError."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **(env or {})}) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise CrepeError(f"'{' '.join(command)}' ended with exit code {process.returncode}")
    return Finished(json.loads(output), seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime)


def crepe_deploy(*arguments: str) -> Finished:
    """Run `crepe-deploy ARGUMENTS --json` in this Python."""
    return run_json([sys.executable, "-m", "crepe_deploy", *arguments, "--json"])
