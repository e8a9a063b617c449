"""A stopped `experts` goes on to the same bytes: what is done is neither measured nor written again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crepe_deploy.exporting import experts as exporting
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import crepe_deploy
from crepe_deploy.cli import interrupt_on_signals, run
from crepe_deploy.errors import ConfigError, DiskFullError, NumericalError, OutputError, ParityError
from crepe_deploy.moe import kept as keeping
from crepe_deploy.progress import Lines, progress
from crepe_deploy.store import journal as journals
from crepe_deploy.store.journal import Journal, open_journal
from crepe_deploy.store.manifest import verify
from crepe_deploy.store.work import JOURNAL
from tests.mutations import mutations
from tests.pico import VOCAB
from tests.pico_moe import make_moe

TOKENS = torch.randint(3, VOCAB, (80, 32), generator=torch.Generator().manual_seed(0))  # two micro-batches
LAYERS = 3
Work = Callable[[], object]


def removed(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    return crepe_deploy.experts(model, out, **({"calib": TOKENS, "remove": 0.25} | options))


def result(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds the seconds that it took."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "report.json"
    }


def ended(monkeypatch: pytest.MonkeyPatch, pieces: int, error: BaseException, work: Work) -> None:
    """Run until the journal has `pieces` more lines, then `error`."""
    add, left = Journal.add, [pieces]

    def struck(journal: Journal, *line: Any) -> None:
        add(journal, *line)
        left[0] -= 1
        if not left[0]:
            raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(Journal, "add", struck)
        work()


@pytest.fixture(scope="module", params=["qwen2_moe", "deepseek_v3"])  # both have a layer without experts
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded(tmp_path_factory.mktemp("one"), "qwen3_moe")


def sharded(folder: Path, layout: str) -> Path:
    whole = make_moe(folder / "whole", layout)
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(folder / "model", max_shard_size="300KB")
    for path in whole.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / "model" / path.name)
    return folder / "model"


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    removed(model, model.parent / "out")
    return model.parent / "out"


@pytest.fixture(scope="module")
def one_whole(one: Path) -> Path:
    removed(one, one.parent / "out")
    return one.parent / "out"


class Layers:
    """Counts the layers that are measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.note = 0, keeping.Kept.note
        monkeypatch.setattr(keeping.Kept, "note", lambda *args: self(*args))

    def __call__(self, *args: Any) -> None:
        self.count += 1
        self.note(*args)


def test_it_goes_on_from_every_piece_to_the_same_bytes(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, lines = tmp_path / "out", list[Any]()
    shards = len(list((whole / "dense").glob("*.safetensors")))
    assert shards > 1
    layers = Layers(monkeypatch)
    for number in range(LAYERS + shards):
        ended(monkeypatch, 1, KeyboardInterrupt(), lambda number=number: removed(model, out, resume=number > 0))
        assert not out.exists()
        lines = (tmp_path / "out.work" / JOURNAL).read_text().splitlines()
        assert len(lines) == number + 2, "one piece more"
        assert layers.count == min(number + 1, LAYERS)
    assert [json.loads(line)["kind"] for line in lines[1:]] == ["layer"] * LAYERS + ["shard"] * shards
    monkeypatch.setattr(Journal, "add", lambda *_: pytest.fail("a piece was made again"))
    told: list[Any] = []
    monkeypatch.setattr(Lines, "go_on", lambda self, done: told.append((self.label, done)))
    report = removed(model, out, resume=True, show=progress)
    assert told == [("measuring experts", LAYERS)], "which are not this run's pace"
    assert result(out) == result(whole)
    assert report["effective_experts"] == json.loads((whole / "report.json").read_text())["effective_experts"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    verify(out / "dense")


def test_a_killed_run_goes_on(one: Path, one_whole: Path, tmp_path: Path) -> None:
    """By SIGKILL in the middle of a file of hidden states, which is left cut off."""
    script = (
        "import os, signal, sys, torch, crepe_deploy\n"
        "from crepe_deploy.moe import kept\n"
        "from tests.export.test_resume_experts import removed\n"
        "save, count = kept.save_file, 0\n"
        "def cut(tensors, path):\n"
        "    global count\n"
        "    save(tensors, path)\n"
        "    count += path.name.startswith('hidden')\n"
        "    if count == 3:\n"
        "        os.truncate(path, path.stat().st_size // 2)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "kept.save_file = cut\n"
        "removed(*sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", script, str(one), str(out)], check=False, cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL and not out.exists()
    lines = (tmp_path / "out.work" / JOURNAL).read_text().splitlines()
    assert len(lines) == 3, "the header, and the layers before"
    removed(one, out, resume=True)
    assert result(out) == result(one_whole)


def test_the_command_stops_at_a_signal_and_goes_on(
    one: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "out"
    argv = ["experts", str(one), "--calib", str(text), "--calib-samples", "8", "--calib-length", "16", "--out"]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    add = Journal.add

    def struck(journal: Journal, *line: Any) -> None:
        add(journal, *line)
        os.kill(os.getpid(), signal.SIGTERM)

    try:
        interrupt_on_signals()
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "add", struck)
            assert run([*argv, str(out)]) == 75
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert run([*argv, str(out)]) == 2
    assert "go on with --resume, or start anew with --overwrite" in capsys.readouterr().err
    assert run([*argv, str(out), "--resume"]) == 0
    assert run([*argv, str(tmp_path / "whole")]) == 0
    assert result(out) == result(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "damage", "again"),
    [
        ("hidden-1", "cut", 2),
        ("hidden-1", "gone", 2),
        ("hidden-1", "a bit", 2),
        ("hidden-0", "cut", 1),
        ("layer-1", "emptied", 2),
        ("layer-0", "a bit", 3),
    ],
)
def test_a_kept_file_that_is_not_what_was_noted_is_measured_again(
    one: Path, one_whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str, again: int
) -> None:
    """Two of three layers are done: what hidden-0 holds, behind the first, is needed only where hidden-1 is spoilt."""
    out = tmp_path / "out"
    ended(monkeypatch, 2, KeyboardInterrupt(), lambda: removed(one, out))
    file = tmp_path / "out.work" / f"{name}.safetensors"
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        file.write_bytes({"cut": data[: len(data) // 2], "emptied": b"", "a bit": flipped}[damage])
    layers = Layers(monkeypatch)
    removed(one, out, resume=True)
    assert layers.count == again
    assert result(out) == result(one_whole)


def test_a_shard_that_is_not_what_was_noted_is_written_again(
    one: Path, one_whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ended(monkeypatch, LAYERS + 1, KeyboardInterrupt(), lambda: removed(one, out))
    dense = tmp_path / "out.work" / "output" / "dense"
    key = json.loads((tmp_path / "out.work" / JOURNAL).read_text().splitlines()[-1])["key"]
    os.truncate(dense / key.partition("/")[2], 1000)
    (dense / "half.json").write_text("{")  # what no piece accounts for
    (dense.parent / "half").write_text("{")
    removed(one, out, resume=True)
    assert result(out) == result(one_whole)


def test_a_full_disk_leaves_what_is_gone_on_from(
    one: Path, one_whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "out", keeping.save_file

    def full(tensors: Any, path: Path) -> None:
        if path.name == "hidden-1.safetensors":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    with monkeypatch.context() as patch, pytest.raises(DiskFullError):
        patch.setattr(keeping, "save_file", full)
        removed(one, out)
    ended(monkeypatch, LAYERS, DiskFullError("full"), lambda: removed(one, out, resume=True))
    removed(one, out, resume=True)
    assert result(out) == result(one_whole)


def test_scores_of_an_earlier_run_need_no_layer(one: Path, one_whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    scores = one_whole / "scores.safetensors"
    asked: dict[str, Any] = {"calib": None, "scores": scores, "remove": 0.5}
    removed(one, tmp_path / "whole", **asked)
    ended(monkeypatch, 1, KeyboardInterrupt(), lambda: removed(one, tmp_path / "out", **asked))
    removed(one, tmp_path / "out", resume=True, **asked)
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_what_a_stop_left_is_said_and_nothing_else_goes_on_from_it(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="nothing to resume"):
        removed(one, out, resume=True)
    assert not list(tmp_path.iterdir())
    ended(monkeypatch, 1, KeyboardInterrupt(), lambda: removed(one, out))
    with pytest.raises(OutputError, match=r"go on with --resume, or start anew with --overwrite"):
        removed(one, out)
    for other, said in (
        ({"remove": 0.5}, "its config is"),
        ({"method": "frequency"}, "its config is"),
        ({"seed": 1}, "its calibration is"),
        ({"dtype": "bfloat16"}, "its config is"),
        ({"calib": TOKENS[:70]}, "its calibration is"),
        ({"base_model": "a/b"}, "its base_model is None"),
    ):
        with pytest.raises(ConfigError, match=f"of another run: {said}"):
            removed(one, out, resume=True, **other)
    with pytest.raises(ConfigError, match="its source is"):
        removed(make_moe(tmp_path / "other"), out, resume=True)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="its versions is"):
        patch.setattr(journals, "versions", lambda: {"torch": "0"})
        removed(one, out, resume=True)
    ended(monkeypatch, 1, KeyboardInterrupt(), lambda: removed(one, out, overwrite=True))
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="another run is writing"):
        patch.setattr(exporting, "finish", lambda *_: removed(one, out, resume=True))
        removed(one, out, resume=True)
    removed(one, out, resume=True)
    verify(out / "dense")


def test_a_record_spoilt_anywhere_is_refused_or_one_of_this_run(tmp_path: Path) -> None:
    path, taken = tmp_path / JOURNAL, 0
    value = {"layer-0.safetensors": "0", "hidden-0.safetensors": "1"}
    for _, spoilt in mutations(value):
        open_journal(path, {}, resume=False, overwrite=True).add("layer", "0", spoilt)
        try:
            assert keeping.Kept(open_journal(path, {}, resume=True), tmp_path).last(1) == -1
            taken += 1
        except ConfigError as error:
            assert "line 2 is no result of layer" in str(error)
    assert taken < len(list(mutations(value)))


def test_what_would_come_again_leaves_nothing_and_what_is_wrong_is_kept(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended(monkeypatch, 2, NumericalError("layer 1"), lambda: removed(one, tmp_path / "out"))
    assert not list(tmp_path.iterdir())

    def wrong(*_: Any) -> None:
        raise ParityError("other logits")

    monkeypatch.setattr(exporting, "check_parity", wrong)
    with pytest.raises(ParityError, match="kept in"):
        removed(one, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]


def test_the_hidden_states_take_the_room_that_was_asked_for(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(exporting, "require_disk", lambda _, size: asked.append(size))
    ended(monkeypatch, 2, KeyboardInterrupt(), lambda: removed(one, tmp_path / "out"))
    kept = [load_file(path) for path in (tmp_path / "out.work").glob("hidden-*.safetensors")]
    states = sum(tensor.nbytes for file in kept for tensor in file.values())
    weights = sum(tensor.nbytes for path in one.glob("*.safetensors") for tensor in load_file(path).values())
    assert asked == [states + weights]
