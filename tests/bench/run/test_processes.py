"""A process that is measured: its document, its own bytes and processor time, and a failure."""

from __future__ import annotations

import sys

import pytest
from crepe_deploy.bench.run.processes import run_json

from crepe_deploy.errors import CrepeError

WORK = "import json, time; held = bytearray(64 << 20); sum(range(3_000_000)); print(json.dumps(time.process_time()))"


def test_figures_are_of_the_process_itself() -> None:
    done = run_json([sys.executable, "-c", WORK])
    assert 0 < done.output <= done.cpu_seconds + 0.01
    assert done.peak_bytes > 64 << 20 and done.seconds > 0


def test_a_failure_names_the_exit_code() -> None:
    with pytest.raises(CrepeError, match="exit code 3"):
        run_json([sys.executable, "-c", "raise SystemExit(3)"])
