"""The harness finds what it is there to find; and a quick share of what `make faults` throws at the product."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from . import figures
from .formats import spoil_safetensors, spoil_yaml
from .mutate import misspell, spoil_bytes, spoil_json, spoil_text
from .strikes import environment

FOUND = """
import os, sys, time
from pathlib import Path
from crepe_deploy import cli
from tests.faults import server, strikes
from tests.faults.run import judge_leftovers

scratch = Path(sys.argv[1])

def outcome(main, **options):
    cli.main = main
    return server.run_in_child(["x"], scratch, own_seconds=2, **options)

def boom():
    raise ValueError("unforeseen")

def spin():
    while True:
        pass

def burst():
    print(len(bytearray(3 << 30)))

def leave():
    if os.fork() == 0:
        time.sleep(3600)
    sys.exit(2)

def write():
    Path("out.partial").mkdir()
    Path("out.partial/file").write_text("x")
    sys.exit(1)

def ask():
    sys.exit(0 if input() == "y" else 1)

def found(name, result):
    judge_leftovers(result, scratch, set())
    print(name, result.code, *result.defects)

for main in (boom, spin, lambda: time.sleep(3600), burst, leave, write, ask):
    found(main.__name__, outcome(main))
(scratch / "cwd" / "out.partial" / "file").unlink()
(scratch / "cwd" / "out.partial").rmdir()
counter = strikes.Counter()
outcome(write, before=strikes.arm(scratch, 0, "EIO", counter))
print("events", counter.value)
"""


def test_crashes_hangs_memory_processes_and_leftovers_are_found(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FOUND, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.splitlines() == [
        "boom 70 exit 70 traceback",
        "spin -24 hang",
        "<lambda> -9 hang",
        "burst 70 exit 70 traceback",
        "leave 2 left a process running",
        "write 1 left out.partial and 1 more",
        "ask 0 left out.partial and 1 more",
        "events 3",
    ]


def run_share(tmp_path: Path, *arguments: Any) -> dict[str, Any]:
    """The figures of a small run in a process of its own; fails with what it found."""
    command = [sys.executable, "-m", "tests.faults", "--jobs", "1", "--out", str(tmp_path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    logs = "".join(path.read_text() for path in tmp_path.glob("*/*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs[-3000:]
    figures: dict[str, Any] = json.loads(next(tmp_path.glob("*/figures.json")).read_text())
    return figures


@pytest.mark.parametrize("seed", range(20))
def test_one_seed_spoils_one_way(seed: int) -> None:
    document = {"a": [1, 2.5, "x"], "b": {"c": None, "d": True}}
    for spoil, good in (
        (spoil_json, document),
        (misspell, b'{"a": 1}'),
        (spoil_bytes, b"abcdefgh" * 9),
        (spoil_text, b"a\nb\nc\n"),
        (spoil_yaml, b"a: [1, 2]\n"),
        (spoil_safetensors, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"),
    ):
        assert repr(spoil(good, Random(seed))) == repr(spoil(good, Random(seed)))
    assert document == {"a": [1, 2.5, "x"], "b": {"c": None, "d": True}}


def test_a_share_of_the_inputs_and_faults(tmp_path: Path) -> None:
    figures = run_share(tmp_path, "--quick", "--inputs", 160, "--faults", 30)
    assert figures["inputs"]["number"] == 160 and figures["faults"]["number"] == 30


@pytest.mark.faults
def test_many_inputs_and_faults(tmp_path: Path) -> None:
    figures = run_share(tmp_path, "--seed", 1, "--inputs", 5000, "--faults", 500)
    assert figures["inputs"]["number"] == 5000 and figures["faults"]["number"] == 500


def test_what_is_published_names_no_place_of_the_machine() -> None:
    scratch = "/dev/shm/crepe-deploy-faults-x1/run"
    place = f"{Path.cwd()}/crepe_deploy/cli.py /opt/v/lib/python3.11/site-packages/torch/a.py {scratch}"
    assert figures.publishable({"at": place}) == '{\n "at": "crepe_deploy/cli.py torch/a.py run"\n}\n'
