"""Healing inside other commands: `--heal` of `prune-and-export` and `tyr`, and the recipe that heals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crepe_deploy.cli import run
from crepe_deploy.pruning.recipe import load_recipe
from crepe_deploy.store.manifest import verify
from tests.healing.conftest import kl
from tests.pico import QUICK_TYR


@pytest.mark.usefixtures("second_a_step")
def test_pruning_and_healing_in_one_command(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["prune-and-export", str(room / "dense"), "--method", "magnitude", "--calib", str(room / "text.txt"),
               "--format", "dense,packed", "--heal", "0.25", "--out", str(tmp_path / "out")]  # fmt: skip
    assert run(command) == 0
    assert "held-out KL to the dense model" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["healed"]["held_out_kl"]["after"] < report["healed"]["held_out_kl"]["before"]
    for name in ("dense", "packed"):
        manifest = verify(tmp_path / "out" / name)
        assert manifest.config["healed"] == report["healed"]
    assert kl(tmp_path / "out" / "packed", room) < kl(room / "nm", room)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dense", "packed", "report.json"]
    assert run([*command[:4], "--heal", "1", "--out", str(tmp_path / "no")]) == 2
    assert "--heal trains on the calibration text" in capsys.readouterr().err


@pytest.mark.usefixtures("second_a_step")
@pytest.mark.parametrize("sparsity", ["2:4", "4:8", "16:32", "0.5", "0.6"])
def test_the_recipe_healed_is_for_every_pattern(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sparsity: str
) -> None:
    shorter = tmp_path / "shorter.yaml"
    shorter.write_text(json.dumps({**load_recipe("healed").model_dump(exclude_none=True), "heal": 0.25}))
    command = ["prune-and-export", str(room / "dense"), "--recipe", str(shorter), "--sparsity", sparsity, "--calib",
               str(room / "text.txt"), "--calib-samples", "8", "--calib-length", "64", "--out",
               str(tmp_path / "out")]  # fmt: skip
    assert run(command) == 0
    healed = verify(tmp_path / "out" / "dense").config["healed"]
    assert healed["steps_taken"] == 15 and healed["held_out_kl"]["after"] < healed["held_out_kl"]["before"]
    assert "held-out KL" in capsys.readouterr().out


@pytest.mark.usefixtures("second_a_step")
def test_tyr_heals_what_it_made_smaller(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tyr", str(room / "dense"), "--calib", str(room / "text.txt"), "--calib-length", "32", *QUICK_TYR,
               "--heal", "0.25", "--out", str(tmp_path / "out")]  # fmt: skip
    assert run(command) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert verify(tmp_path / "out" / "dense").config["healed"] == report["healed"]
    assert kl(tmp_path / "out" / "dense", room) < kl(room / "tyr" / "dense", room)
    assert "held-out KL to the dense model" in capsys.readouterr().out
    assert run([*command[:-1], str(tmp_path / "deci"), "--layout", "deci"]) == 2
    assert "is not trained" in capsys.readouterr().err
