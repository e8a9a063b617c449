"""Every command on every kind of folder that a command writes: a result, or a refusal that names the cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crepe_deploy.cli import run
from tests.pico import QUICK_TYR, make_pico_llama, sample_text

KINDS = (
    "plain", "pruned", "dense", "packed", "packed rows", "packed mixed", "int8", "uniform", "per-layer", "deci",
    "report of formats", "empty",
)  # fmt: skip
REFUSED = {  # what a command does not take, with a word of the reason
    ("verify", "plain"): "manifest.json",
    ("verify", "report of formats"): "is no model, it holds 3: name",
    ("verify", "empty"): "manifest.json",
    ("inspect", "report of formats"): "is no model, it holds 3: name",
    ("inspect", "empty"): "config.json",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each kind, made by the commands that make them."""
    root = tmp_path_factory.mktemp("kinds")
    plain, text = make_pico_llama(root / "plain"), root / "text.txt"
    text.write_text(sample_text(4000))
    calibration = ["--calib", str(text), "--calib-samples", "4", "--calib-length", "64"]

    def make(*arguments: object) -> None:
        assert run([str(argument) for argument in arguments]) == 0, arguments

    make("prune", plain, "--out", root / "pruned", "--method", "magnitude")
    formats = ["--method", "magnitude", "--format", "dense,packed,int8"]
    make("prune-and-export", plain, "--out", root / "formats", *formats)
    make("prune", plain, "--out", root / "rows", "--method", "magnitude", "--sparsity", "0.5")
    make("export", root / "rows", "--format", "packed", "--out", root / "packed-rows")
    mixed = ["--sparsity", "4:8", "--allocate", "owl", *calibration]
    make("prune-and-export", plain, "--out", root / "mixed", "--format", "packed", *mixed)
    for widths in ("uniform", "per-layer"):
        windows = ["--search-samples", "2"] if widths == "per-layer" else ["--search-samples", "1"]
        make("tyr", plain, "--out", root / widths, "--widths", widths, *QUICK_TYR, *calibration, *windows)
    make("export", root / "per-layer" / "dense", "--format", "deci", "--out", root / "deci")
    (root / "empty").mkdir()
    return {
        "plain": plain, "pruned": root / "pruned", "dense": root / "formats" / "dense",
        "packed": root / "formats" / "packed", "packed rows": root / "packed-rows",
        "packed mixed": root / "mixed" / "packed", "int8": root / "formats" / "int8",
        "uniform": root / "uniform" / "dense", "per-layer": root / "per-layer" / "dense", "deci": root / "deci",
        "report of formats": root / "formats", "empty": root / "empty",
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_folders_are_verified_and_inspected(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], command: str, kind: str
) -> None:
    capsys.readouterr()
    code = run([command, str(folders[kind]), "--json"])
    out, err = capsys.readouterr()
    if (command, kind) in REFUSED:
        assert code == 2 and REFUSED[command, kind] in err
        assert REFUSED[command, kind] in json.loads(out)["error"]
    else:
        assert code == 0 and json.loads(out)["folder"] == str(folders[kind]), err


def test_a_packed_folder_is_inspected_as_the_dense_one_that_it_stands_for(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {}
    for kind in ("dense", "packed"):
        capsys.readouterr()
        assert run(["inspect", str(folders[kind]), "--json"]) == 0
        rows[kind] = json.loads(capsys.readouterr().out)["tensors"]
    packed = {row["name"]: row.pop("packed", False) for row in rows["packed"]}
    by_name = {kind: {row["name"]: row for row in counted} for kind, counted in rows.items()}
    assert by_name["packed"] == by_name["dense"]
    assert {name for name, stored in packed.items() if stored} == {
        name for name, row in by_name["dense"].items() if row["pattern"] == "2:4"
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["dense", "packed", "int8", "deci"])
def test_every_folder_is_exported_or_refused(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str, format: str
) -> None:
    out = tmp_path / "out"
    code = run(["export", str(folders[kind]), "--format", format, "--out", str(out)])
    err = capsys.readouterr().err
    if code == 0:
        assert run(["verify", str(out)]) == 0
    else:
        assert code == 2 and "error: " in err and not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if code == 0 else [])


@pytest.mark.parametrize("kind", KINDS)
def test_every_folder_is_planned_for_and_evaluated_or_refused(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text(2000, seed=1))
    for arguments in (
        ["plan", str(folders[kind])],
        ["eval", str(folders[kind]), "--text", str(text), "--window", "32"],
    ):
        code = run(arguments)
        err = capsys.readouterr().err
        assert code == 0 or (code == 2 and "error: " in err), (arguments, err)


@pytest.mark.parametrize("kind", KINDS)
def test_every_folder_is_pruned_or_refused(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    code = run(["prune", str(folders[kind]), "--method", "magnitude", "--out", str(out)])
    err = capsys.readouterr().err
    assert code == 0 or (code == 2 and "error: " in err and not out.exists()), err
