"""The demo's story on a tiny model, with the commands that it runs: everything but the serving."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from crepe_deploy.bench import demo
from crepe_deploy.bench.demo_shown import COLUMNS, markdown
from PIL import Image

from crepe_deploy.errors import DiskFullError
from tests.bench.command import in_this_process
from tests.pico import make_pico_llama, sample_text


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> demo.Settings:
    room = tmp_path_factory.mktemp("demo")
    for name, seed in (("calib.txt", 0), ("test.txt", 1)):
        (room / name).write_text(sample_text(4000, seed), encoding="utf-8")
    return demo.Settings(
        "pico", make_pico_llama(room / "model", torch.bfloat16), room / "calib.txt", room / "test.txt",
        length=32, windows=8, evaluation=("--window", "64", "--max-tokens", "512"),
        healing=("--learning-rate", "1e-3", "--batch-tokens", "256", "--window", "64"),
    )  # fmt: skip


def test_the_story(
    settings: demo.Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "crepe_deploy", in_this_process)
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    result = demo.tell(settings, out, demo.STORY, 0.05, False, tmp_path / "demo.json")
    printed = capsys.readouterr()
    assert printed.err.startswith("pico: 3 pruned models, one of them healed") and " GB" in printed.err.splitlines()[0]
    names = [f"{row['method']} {row['pattern']}" for row in result["rows"]]
    assert names == ["dense -", "ria 16:32", "crepe 16:32", "recipe best 16:32", "recipe best, healed 16:32"]
    assert all(row["sparsity"] == pytest.approx(0.5, abs=1e-3) and row["kl"] > 0 for row in result["rows"][1:])
    assert [row["format"] for row in result["rows"]] == ["dense", "dense", "dense", "packed", "packed"]
    assert set(result["sentences"]) == set(demo.PROMPTS)
    assert all(len(said) == 5 for said in result["sentences"].values())
    for prompt in demo.PROMPTS:
        assert prompt in printed.out
    assert json.loads((tmp_path / "demo.json").read_text()) == result
    page = (tmp_path / "demo.md").read_text()
    assert page == markdown(result)
    assert all(line.count("|") == len(COLUMNS) + 1 for line in page.splitlines()[:7])
    with Image.open(out / "demo.png") as picture:
        assert picture.width > 600 and picture.height > 200
    assert (out / "mine").is_dir()  # what the demo did not write stays


def test_no_room_is_said_before_anything_is_done(
    settings: demo.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crepe_deploy.store.files.DISK_MARGIN_BYTES", 1 << 60)
    with pytest.raises(DiskFullError):
        demo.tell(settings, tmp_path / "out", demo.STORY, None, False, None)
    assert list((tmp_path / "out").iterdir()) == []
