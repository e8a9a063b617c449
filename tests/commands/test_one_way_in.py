"""`inspect`, `export`, `eval`, `plan`, `serve` and `bench` take a folder, a hub id and a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
from crepe_deploy.bench.commands.bench import build_scenario

from crepe_deploy.cli import run
from tests.gguf_files import write_gguf
from tests.pico import make_pico_llama, sample_text

REVISION = "0123456789abcdef0123456789abcdef01234567"
KINDS = ["hub", "gguf"]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A model as a hub's snapshot on this disk, offline, and as a GGUF file."""
    plain = make_pico_llama(tmp_path / "plain")
    assert run(["prune", str(plain), "--method", "magnitude", "--out", str(tmp_path / "pruned")]) == 0
    repository = tmp_path / "hub" / "models--someone--pico"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    (repository / "snapshots").mkdir()
    (tmp_path / "pruned").rename(repository / "snapshots" / REVISION)
    (repository / "blobs").mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    gguf = write_gguf(tmp_path / "pico.gguf", repository / "snapshots" / REVISION)
    (tmp_path / "text.txt").write_text(sample_text(2000))
    return {"hub": "someone/pico", "gguf": str(gguf)}


@pytest.mark.parametrize("kind", KINDS)
def test_each_command_takes_it(names: dict[str, str], capsys: pytest.CaptureFixture[str], kind: str) -> None:
    model = names[kind]
    for arguments in (
        ["inspect", model],
        ["plan", model],
        ["eval", model, "--text", "text.txt", "--window", "32"],
        ["export", model, "--format", "packed"],
    ):
        capsys.readouterr()
        code = run([*arguments, "--json"])
        document = json.loads(capsys.readouterr().out)
        assert code == 0 and document, document
    assert Path("pico-packed/manifest.json").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_bench_finds_its_folder_and_names_it_as_typed(names: dict[str, str], kind: str) -> None:
    given = {"baseline": None, "points": None, "rounds": None, "threads": None, "text": None, "max_tokens": None}
    scenario = build_scenario([Path(names[kind])], engine="transformers", aa=False, window=512, **given)  # type: ignore[arg-type]
    (candidate,) = scenario.candidates
    assert candidate.name == Path(names[kind]).name and (candidate.folder / "config.json").is_file()


@pytest.mark.parametrize("command", ["inspect", "plan", "export", "serve", "eval"])
def test_a_hub_id_that_is_not_on_this_disk(
    names: dict[str, str], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert names
    more = ["--text", "text.txt"] if command == "eval" else ["--port", "0"] if command == "serve" else []
    assert run([command, "nobody/nothing", *more]) == 2
    said = capsys.readouterr().err
    assert "the hub did not give it: it cannot be reached" in said and "hf download nobody/nothing" in said
    assert not Path("nothing-dense").exists()


@pytest.mark.parametrize("command", ["inspect", "plan", "export", "serve", "eval", "verify"])
def test_a_folder_of_models_names_them(
    names: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    text = str(Path("text.txt").resolve())
    for name in ("dense", "packed"):
        (tmp_path / "small" / name).mkdir(parents=True)
        (tmp_path / "small" / name / "config.json").write_text("{}")
    more = ["--text", text] if command == "eval" else ["--port", "0"] if command == "serve" else []
    assert names
    assert run([command, str(tmp_path / "small"), *more]) == 2
    small = tmp_path / "small"
    assert f"{small} is no model, it holds 2: name {small}/dense or {small}/packed" in capsys.readouterr().err


def test_a_missing_folder_beside_others_is_named_before_the_hub_is_asked(
    names: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert names
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick" / "dense").mkdir(parents=True)
    assert run(["inspect", "quick/packed"]) == 2
    assert "the folder quick here has no packed (it has dense); fetching" in capsys.readouterr().err


def test_an_output_that_exists_is_refused_before_anything_is_converted(
    names: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    assert run(["export", names["gguf"], "--out", "out"]) == 2
    assert run(["export", names["gguf"], "--format", "pakced"]) == 2
    assert not Path("cache/crepe-deploy").exists() and capsys.readouterr().err
