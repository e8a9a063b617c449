"""A user without a home and without an entry in the password file: what a container is often run as."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crepe_deploy import machine
from crepe_deploy.errors import ConfigError
from tests.pico import make_pico_llama, sample_text

NOBODY = """
import json, pwd, sys
def unknown(*_):
    raise KeyError("uid not found")
pwd.getpwuid = unknown
from crepe_deploy import cli
print("CODES", json.dumps([cli.run(arguments) for arguments in json.loads(sys.argv[1])]))
"""


def test_commands_work_without_a_home(tmp_path: Path) -> None:
    model = str(make_pico_llama(tmp_path / "m"))
    text, out = tmp_path / "t.txt", str(tmp_path / "out")
    text.write_text(sample_text(3000), encoding="utf-8")
    commands = [
        ["doctor"],
        ["plan", model],
        ["eval", model, "--text", str(text), "--window", "32", "--max-tokens", "64"],
        ["prune", model, "--out", out, "--method", "magnitude"],
        ["verify", out],
    ]
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")}
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, json.dumps(commands)],
        capture_output=True,
        text=True,
        check=False,
        env={**kept, "TMPDIR": str(tmp_path)},
    )
    assert f"CODES {[0] * len(commands)}" in done.stdout, done.stderr
    assert (tmp_path / f"crepe-deploy-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(machine.Path, "home", homeless)
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = machine.cache_dir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        machine.cache_dir()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        machine.cache_dir()
