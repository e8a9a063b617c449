"""A server never outlives the command that started it, whatever ends that; nor does anything that it started."""

from __future__ import annotations

import itertools
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crepe_deploy.exporting.pipeline import export_checkpoint
from crepe_deploy.serve.launcher import free_port

from tests.onnx_models import pruned_model
from tests.serve.processes import HANG_S, below, wait_until_gone

FAKE = Path(__file__).with_name("fake_server.py")
RUN_FAKE = """
import json, sys
from pathlib import Path
from crepe_deploy.cli import interrupt_on_signals
from crepe_deploy.serve.command import say
from crepe_deploy.serve.launcher import ServeOptions, run
interrupt_on_signals()
command, port = sys.argv[1:-1], int(sys.argv[-1])
run(command, ServeOptions(Path(".")), port, None, say, lambda found: print(json.dumps(found), flush=True))
"""
SERVE = "from crepe_deploy.cli import main; main()"
ENDS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported graph."""
    root = tmp_path_factory.mktemp("life")
    export_checkpoint(pruned_model(root), root / "onnx", "onnx", options={"flavor": "portable", "precision": "fp32"})
    return root / "onnx"


def command_of(engine: str, folder: Path) -> list[str]:
    """`serve` on ONNX Runtime, or on the fake server in one of its modes."""
    python = [sys.executable, "-P", "-c"]
    if engine == "onnx":
        return [*python, SERVE, "serve", str(folder), "--port", "0", "--json"]
    port = str(free_port("127.0.0.1"))
    return [*python, RUN_FAKE, sys.executable, str(FAKE), port, engine, port]


def start(command: list[str], logs: Path, **options: Any) -> tuple[subprocess.Popen[str], set[int]]:
    """Start `serve`, wait until it is ready; it, and everything below it. Tests under nohup do not hand that down."""
    variables = os.environ | {"TMPDIR": str(logs)}
    command = ["env", "--default-signal=HUP,INT", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables, **options)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["url"]
    process.stdout.close()
    return process, below(process.pid)


@pytest.mark.parametrize(
    ("engine", "number"), [*itertools.product(("good", "onnx"), ENDS), ("brood", signal.SIGKILL)]
)  # a brood that ignores what it is asked gets half a minute of patience from all but SIGKILL
def test_whatever_ends_serve_ends_all_of_it(engine: str, number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    process, all_of_it = start(command_of(engine, folder), tmp_path)
    assert len(all_of_it) >= (4 if engine == "brood" else 2)
    process.send_signal(number)
    assert process.wait(HANG_S) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    wait_until_gone(all_of_it)


@pytest.mark.parametrize("victim", ["keeper", "server"])
def test_nothing_stays_when_a_part_is_killed(victim: str, folder: Path, tmp_path: Path) -> None:
    process, all_of_it = start(command_of("onnx", folder), tmp_path, stderr=subprocess.PIPE)
    keeper = next(number for number in all_of_it if b"keeper.py" in Path(f"/proc/{number}/cmdline").read_bytes())
    os.kill(keeper if victim == "keeper" else below(keeper).pop(), signal.SIGKILL)
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(HANG_S) == 1
    assert "error: the server ended by itself with code" in said and "(SIGKILL)" in said and "Traceback" not in said
    wait_until_gone(all_of_it)


def test_a_terminal_that_hangs_up_ends_it(folder: Path, tmp_path: Path) -> None:
    terminal, inner = pty.openpty()
    command = ["setsid", "--ctty", *command_of("onnx", folder)]
    process, all_of_it = start(command, tmp_path, stdin=inner, stderr=inner)
    os.close(inner)
    os.close(terminal)  # the kernel sends SIGHUP to the session that this terminal controls
    assert process.wait(HANG_S) == 0
    wait_until_gone(all_of_it)


def test_nohup_keeps_it(folder: Path, tmp_path: Path) -> None:
    process, all_of_it = start(["nohup", *command_of("onnx", folder)], tmp_path)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    assert process.poll() is None
    process.terminate()
    assert process.wait(HANG_S) == 0
    wait_until_gone(all_of_it)
