"""`heal`: what comes out of it, from every kind of pruned folder."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import crepe_deploy
from crepe_deploy.cli import run
from crepe_deploy.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    CrepeError,
    DiskFullError,
    NumericalError,
    OutputError,
    VerifyError,
)
from crepe_deploy.healing import train
from crepe_deploy.progress import Progress
from crepe_deploy.store.audit import inspect_folder
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.manifest import verify
from tests.healing.conftest import Heal, kl
from tests.pico import make_pico_llama


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {info.name: reader.load(info.name) for info in reader}


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert {name: (one.shape, one.dtype) for name, one in old.items()} == {
        name: (one.shape, one.dtype) for name, one in new.items()
    }
    return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.mark.parametrize(("folder", "pattern"), [("nm", "2:4"), ("row", "0.5/row")])
def test_a_masked_folder_gets_better_and_keeps_its_zeros(
    room: Path, tmp_path: Path, heal: Heal, folder: str, pattern: str
) -> None:
    manifest, out = heal(folder), tmp_path / "out"
    assert verify(out) == manifest and not list(tmp_path.glob("*work*"))
    healed = manifest.config["healed"]
    assert healed["held_out_kl"]["after"] < healed["held_out_kl"]["before"]
    assert kl(out, room) < kl(room / folder, room)
    assert healed["dense"]["files"] == manifest.source.files and healed["texts"][0]["sha256"]
    assert (healed["steps"], healed["steps_taken"], healed["tokens"]) == (12, 12, 12 * 128)
    moved = changed(room / folder, out)
    assert set(manifest.tensors) <= moved
    assert moved - set(manifest.tensors) == {name for name in tensors(out) if "norm" in name}
    for name, before in tensors(room / folder).items():
        if name in manifest.tensors:
            assert (tensors(out)[name][before == 0] == 0).all()
    counted = {one["name"]: one for one in inspect_folder(out)}
    for name, record in manifest.tensors.items():
        assert record.zeros == counted[name]["zeros"] and record.pattern == pattern and record.layer_error is None
        assert counted[name]["pattern"] == pattern


def test_narrowed_layers_are_healed_and_their_prompt_and_card_renewed(room: Path, tmp_path: Path, heal: Heal) -> None:
    source, out = room / "tyr" / "dense", tmp_path / "out"
    manifest = heal(source)
    assert verify(out) == manifest and manifest.parent is not None
    moved = changed(source, out)
    assert all(name in moved for name in tensors(out) if "proj" in name or "norm" in name)
    assert "embed" not in "".join(moved) and "model.layers.0" in "".join(moved)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert manifest.metrics["greedy"]["token_ids"]
    card = (out / "README.md").read_text()
    assert "trained" in card and "text.txt" in card and "held-out KL" in card
    assert kl(out, room) < kl(source, room)


def test_what_was_healed_is_exported_and_healed_again(room: Path, tmp_path: Path, heal: Heal) -> None:
    heal(out=tmp_path / "once", steps=3)
    twice = heal(tmp_path / "once", out=tmp_path / "twice", steps=3)
    packed = crepe_deploy.export(tmp_path / "twice", tmp_path / "packed", format="packed")
    assert packed.config["healed"] == twice.config["healed"] and "healed" in (tmp_path / "packed/README.md").read_text()
    assert packed.source.id.endswith("dense")
    with pytest.raises(ConfigError, match="format packed, which is not trained"):
        heal(tmp_path / "packed", out=tmp_path / "no")


def test_norms_alone(room: Path, tmp_path: Path, heal: Heal) -> None:
    heal(train="norms")
    assert changed(room / "nm", tmp_path / "out") == {name for name in tensors(room / "nm") if "norm" in name}


@pytest.mark.parametrize("options", [{"accumulate": 2, "checkpointing": True}, {"dtype": "float32"}, {"top_k": 20}])
def test_other_ways_to_compute_lead_to_as_good_a_place(room: Path, heal: Heal, tmp_path: Path, options: Any) -> None:
    plain = heal().config["healed"]["held_out_kl"]
    other = heal(out=tmp_path / "other", **options).config["healed"]["held_out_kl"]
    assert other["before"] == pytest.approx(plain["before"], rel=0.02)
    assert other["after"] == pytest.approx(plain["after"], rel=0.05)


def test_an_adapter_is_masked_and_merged(room: Path, tmp_path: Path, heal: Heal) -> None:
    manifest = heal("nm", lora=4, learning_rate=5e-3)
    assert manifest.config["healed"]["adapters"] == "LoRA, merged outside the zeros"
    before, after = tensors(room / "nm"), tensors(tmp_path / "out")
    for name in manifest.tensors:
        assert (after[name][before[name] == 0] == 0).all() and not torch.equal(before[name], after[name])
    assert kl(tmp_path / "out", room) < kl(room / "nm", room)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


class Stop:
    """A progress that stops the run once it has been told of so many steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    @contextmanager
    def __call__(self, label: str) -> Iterator[Progress]:
        def step(done: int, total: int) -> None:
            if done == self.at:
                raise KeyboardInterrupt

        yield step


@pytest.mark.parametrize("lora", [None, 4])
def test_equal_seeds_give_equal_bytes_stopped_or_not(tmp_path: Path, heal: Heal, lora: int | None) -> None:
    heal(out=tmp_path / "whole", steps=30, lora=lora)
    for at in (5, 17, 29):
        with pytest.raises(KeyboardInterrupt):
            heal(out=tmp_path / "stopped", steps=30, lora=lora, show=Stop(at), resume=at > 5)
        assert not (tmp_path / "stopped").exists() and (tmp_path / "stopped.work").is_dir()
    heal(out=tmp_path / "stopped", steps=30, lora=lora, resume=True)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole") and not (tmp_path / "stopped.work").exists()
    heal(out=tmp_path / "seed", steps=30, lora=lora, seed=1)
    assert files(tmp_path / "seed") != files(tmp_path / "whole")


def test_a_stopped_run_is_resumed_as_it_was_or_started_anew(tmp_path: Path, heal: Heal) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        heal(resume=True)
    with pytest.raises(KeyboardInterrupt):
        heal(show=Stop(5))
    with pytest.raises(OutputError, match="--resume"):
        heal()
    with pytest.raises(ConfigError, match="config"):
        heal(resume=True, learning_rate=2e-3)
    heal(overwrite=True)
    assert not (tmp_path / "out.work").exists()


@pytest.mark.usefixtures("second_a_step")
def test_minutes_are_a_budget(heal: Heal) -> None:
    healed = heal(steps=None, minutes=0.2).config["healed"]
    assert healed["seconds"] == healed["steps_taken"] == 12 and healed["config"]["steps"] is None


def test_the_estimate_of_a_resumed_run_counts_its_own_steps(heal: Heal, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(train, "going_on", lambda _step, done: told.append(done))
    with pytest.raises(KeyboardInterrupt):
        heal(steps=30, show=Stop(15))
    heal(steps=30, resume=True)
    assert told == [0, 10]


def test_what_is_no_better_is_not_written(tmp_path: Path, heal: Heal) -> None:
    with pytest.raises(NumericalError, match="made nothing better in 12 steps"):
        heal(learning_rate=10.0)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_no_number_stops_with_the_best_so_far(
    tmp_path: Path, heal: Heal, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crepe_deploy.healing.config import HealConfig

    monkeypatch.setattr(HealConfig, "rate", lambda self, share: 1e-3 if share <= 0.55 else 1e38)
    said: list[str] = []
    manifest = heal(steps=20, say=said.append)
    healed = manifest.config["healed"]
    assert healed["steps"] == 10 and healed["steps_taken"] < 20 and "nan" in healed["stopped"]
    assert any("stopped; the best so far is step 10" in line for line in said)
    assert healed["held_out_kl"]["after"] < healed["held_out_kl"]["before"] and verify(tmp_path / "out") == manifest


def other_model(room: Path, tmp_path: Path) -> dict[str, Any]:
    return {"dense": make_pico_llama(tmp_path / "other", torch.bfloat16, seed=1)}


def short_text(room: Path, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "short.txt").write_text("Too little of it.")
    return {"text": tmp_path / "short.txt"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (other_model, CheckpointError, "is not the model that .* came from"),
        (short_text, CalibrationError, "give more text"),
        ({"steps": 3, "minutes": 1.0}, ConfigError, "both a budget"),
        ({"window": 1024, "batch_tokens": 1024}, ConfigError, "exceeds the model's context of 512"),
        ({"accumulate": 3}, ConfigError, "does not come out even"),
        ({"batch_tokens": 16}, ConfigError, "hold no window"),
        ({"train": "biases"}, ConfigError, "one or both of norms, kept"),
        ({"train": "norms", "lora": 4}, ConfigError, "leaves out"),
        ({"dtype": "float16"}, ConfigError, "computes in"),
        ({"holdout": 0.9}, ConfigError, "at most 0.5"),
        ({"text": []}, ConfigError, "needs text"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    room: Path, tmp_path: Path, heal: Heal, options: Any, error: type[CrepeError], message: str
) -> None:
    given = options(room, tmp_path) if callable(options) else options
    with pytest.raises(error, match=message):
        heal(**given)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.work").exists()


def test_a_dense_model_with_another_tokenizer_is_refused(room: Path, tmp_path: Path, heal: Heal) -> None:
    import shutil

    shutil.copytree(room / "dense", tmp_path / "dense")
    path = tmp_path / "dense" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="different tokenizers"):
        heal(dense=tmp_path / "dense")


def test_folders_that_are_not_pruned_ones_are_refused(room: Path, tmp_path: Path, heal: Heal) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        heal("dense")
    import shutil

    shutil.copytree(room / "nm", tmp_path / "changed")
    with (tmp_path / "changed" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x11")
    with pytest.raises(VerifyError, match="differs from its sha256"):
        heal(tmp_path / "changed")


def test_a_full_disk_is_said_and_what_was_done_goes_on(tmp_path: Path, heal: Heal) -> None:
    heal(out=tmp_path / "whole", steps=20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (40_000, hard)
        )  # a file that grows beyond is refused as on a full disk
        with pytest.raises(DiskFullError, match="the disk is full"):
            heal(steps=20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    heal(steps=20, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole") and not (tmp_path / "out.work").exists()


def test_two_processes_heal_together(room: Path, tmp_path: Path, heal: Heal) -> None:
    alone = heal(out=tmp_path / "alone").config["healed"]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--rdzv_backend",
        "c10d", "--rdzv_endpoint", "localhost:0", "-m", "crepe_deploy", "heal", str(room / "nm"), "--dense",
        str(room / "dense"), "--text", str(room / "text.txt"), "--steps", "12", "--learning-rate", "0.001",
        "--batch-tokens", "128", "--window", "32", "--out", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together["processes"] == 2 and verify(tmp_path / "out")
    for when in ("before", "after"):
        assert together["held_out_kl"][when] == pytest.approx(alone["held_out_kl"][when], rel=0.02)
    before, after = tensors(room / "nm"), tensors(tmp_path / "out")
    assert all((after[name][before[name] == 0] == 0).all() for name in before if "proj" in name)


def test_the_command_says_what_it_did(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["heal", str(room / "nm"), "--dense", str(room / "dense"), "--text", str(room / "text.txt"), "--steps",
                 "6", "--learning-rate", "0.001", "--batch-tokens", "64",
                 "--window", "32", "--out", str(tmp_path / "out")]  # fmt: skip
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert "every zero held" in shown.out and "held-out KL to the dense model" in shown.out
    assert "step 6: loss" in shown.err and "healing: done" in shown.err
    assert run(arguments) == 2
    assert "exists: give another --out" in capsys.readouterr().err
