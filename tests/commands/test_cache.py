"""`cache` lists what is kept and where; `cache clean` removes that and nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import re
from pathlib import Path

import huggingface_hub.constants
import pytest

from crepe_deploy.cli import run
from crepe_deploy.machine import cache_dir
from crepe_deploy.selftext import SELF
from crepe_deploy.store.cache import GGUF_CACHE, KINDS
from tests.gguf_files import write_gguf
from tests.pico import make_pico_llama
from tests.test_project import SOURCES

SHA, HASH = "0123456789abcdef" * 4, "0123456789abcdef"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one entry of each kind, made by hand but for the first; a hub's cache with a model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    gguf = write_gguf(tmp_path / "pico.gguf", make_pico_llama(tmp_path / "pico"))
    assert run(["prune", str(gguf), "--method", "magnitude", "--out", "pruned"]) == 0
    ours = cache_dir()
    for name in (f"gguf/{SHA}/model.safetensors", f"self/{SHA}.json", f"kernels/{HASH}/lock", f"plans/{HASH}.json"):
        (ours / name).parent.mkdir(parents=True, exist_ok=True)
        (ours / name).write_text("x" * 1000)
    snapshot = tmp_path / "hub" / "models--someone--pico" / "snapshots" / ("a" * 40)
    make_pico_llama(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    return ours


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:  # type: ignore[type-arg]
    capsys.readouterr()
    assert run(["cache", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_everything_that_is_kept_is_listed_with_its_size(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = document(capsys)
    assert listed["folder"] == str(place)
    assert [one["kind"] for one in listed["entries"]] == ["gguf", "gguf", "kernels", "speeds", "text"]
    assert "not read any more" in listed["entries"][0]["what"] and listed["entries"][1]["what"].startswith("pico.gguf")
    files = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    assert listed["bytes"] == sum(one["bytes"] for one in listed["entries"]) == files
    (repository,) = listed["hugging_face"]["repositories"]
    assert (repository["kind"], repository["id"], repository["revisions"]) == ("model", "someone/pico", ["a" * 40])
    assert repository["bytes"] > 0
    assert run(["cache"]) == 0
    text = capsys.readouterr().out
    assert "someone/pico" in text and "pico.gguf, dequantised" in text and "cache clean" in text


def test_clean_removes_its_own_and_nothing_else(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = [
        place / "mine.txt",
        place / "self" / "mine.json",
        place / "kernels" / "notes" / "a.txt",
        place / "x" / "y",
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (place / "kernels" / HASH[::-1]).symlink_to(place / "x")
    hub = {path: path.lstat().st_mtime for path in Path("hub").rglob("*")}
    listed = document(capsys)
    cleaned = document(capsys, "clean")
    assert cleaned["removed"] == listed["entries"] and cleaned["bytes"] == listed["bytes"] and cleaned["left"] == []
    assert all(path.read_text() == "mine" for path in foreign)
    assert (place / "kernels" / HASH[::-1]).is_symlink()
    assert not (place / "plans").exists() and not (place / GGUF_CACHE).exists()
    assert {path: path.lstat().st_mtime for path in Path("hub").rglob("*")} == hub
    assert document(capsys)["entries"] == []
    assert run(["cache", "clean"]) == 0 and "0 entries removed, 0 B freed" in capsys.readouterr().out


def test_what_a_run_is_writing_stays(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    building = os.open(place / "kernels" / HASH / "lock", os.O_RDONLY)
    fcntl.flock(building, fcntl.LOCK_EX)
    (place / "self" / f".{SHA}.json.crepe-deploy-{os.getpid()}").write_text("half")
    left = document(capsys, "clean")["left"]
    os.close(building)
    assert [one["why"] for one in left] == ["a run is writing it"] * 2
    assert (place / "kernels" / HASH).is_dir() and document(capsys, "clean")["left"] != []


def test_every_place_in_the_cache_is_a_kind_that_is_listed() -> None:
    used = {name for path in SOURCES for name in re.findall(r"cache_dir\(\) / (\S+?)(?:\s|$)", path.read_text())}
    names = {"GGUF_CACHE": GGUF_CACHE, "SELF": SELF}
    places = {names.get(one, one.strip('"')) for one in used}
    assert places == {GGUF_CACHE, SELF, "kernels", "plans"}
    assert all(any(re.fullmatch(kind, one) for kind in KINDS) for one in places)
