"""`tyr --repair block`: narrowed blocks come nearer to the dense ones, shapes stay, and a stopped run ends alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crepe_deploy.api.tyr import tyr
from crepe_deploy.cli import run
from crepe_deploy.errors import EXIT_RESUMABLE, VerifyError
from crepe_deploy.progress import Lines, progress
from crepe_deploy.pruning.steps.repair import BlockRepair
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.manifest import verify
from crepe_deploy.structural import tuned
from tests.structural.random_plans import make_model
from tests.structural.stop import Stop

REPAIR = "block:steps=24,rate=0.003"
STILL = "block:steps=1,rate=1e-8"  # prunes on the same windows and moves nothing that can be seen


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What a run without a stop wrote, and its report."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, pruned(model, text, out)


def pruned(model: Path, text: Path, out: Path, **more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"method": "uniform", "repair": REPAIR, **more}
    return tyr(
        model, out, calib=str(text), sparsity=0.4, calib_samples=16, calib_length=64, iterations=1, generations=1,
        offspring=2, ffn_multiple=16, **options,
    )  # fmt: skip


def weights(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("family", "dtype", "more"),
    [
        ("llama", torch.bfloat16, {"widths": "uniform"}),
        ("qwen2", torch.float32, {"method": "magnitude"}),
        ("qwen3", torch.float32, {"layout": "plugin", "finish": "paired"}),
        ("phi3", torch.float32, {"method": "tyr", "finish": "supernet"}),
        ("gemma2", torch.bfloat16, {}),
        ("llama", torch.float32, {"layout": "deci", "dtype": "float32"}),
    ],
)
def test_blocks_come_nearer_and_shapes_stay(
    tmp_path: Path, text: Path, family: str, dtype: torch.dtype, more: dict[str, Any]
) -> None:
    dense = make_model(tmp_path / family, family, dtype)
    report = pruned(dense, text, tmp_path / "out", **more)
    still = pruned(dense, text, tmp_path / "still", **more, repair=STILL)
    errors = report["repair"]
    assert len(errors) == 3 and all(0 < block["after"] <= block["before"] for block in errors)
    assert sum(block["after"] for block in errors) < 0.98 * sum(block["before"] for block in errors)
    assert report["layers"] == still["layers"] and errors[0]["before"] == still["repair"][0]["before"]
    manifest = verify(tmp_path / "out" / "dense")
    assert manifest.config["repair"] == REPAIR and manifest.metrics["repair"] == errors
    tuned, before = (CheckpointReader(tmp_path / name / "dense") for name in ("out", "still"))
    assert {info.name: (info.shape, info.dtype) for info in tuned} == {
        info.name: (info.shape, info.dtype) for info in before
    }
    changed = {info.name for info in tuned if not torch.equal(tuned.load(info.name), before.load(info.name))}
    assert any(name.endswith("norm.weight") for name in changed)
    assert all(".layers." in name and not name.endswith("bias") for name in changed)


def test_it_is_the_repair_of_pruning_and_told_what_the_dense_block_does(
    monkeypatch: pytest.MonkeyPatch, model: Path, text: Path, tmp_path: Path
) -> None:
    seen = []

    def watched(self: BlockRepair, block: Any, tuned: Any, learnt: Any, held: Any, tick: Any) -> Any:
        with torch.no_grad():
            first = learnt[0].call(block, learnt[0].given)
        seen.append((first, learnt[0].wanted, [len(lesson.given) for lesson in (*learnt, *held)]))
        return inner(self, block, tuned, learnt, held, tick)

    inner = BlockRepair.__call__
    monkeypatch.setattr(BlockRepair, "__call__", watched)
    pruned(model, text, tmp_path / "out")
    assert len(seen) == 3
    for first, wanted, windows in seen:
        assert first.shape == wanted.shape and not torch.equal(first, wanted)
        assert windows == [12, 4]  # of 16, a quarter is held out


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_stopped_run_ends_with_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch, model: Path, text: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]],
    at: int, where: str,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    stopped = Stop(tuned.save_file, at) if where == "before" else Stop(tuned.sha256_file, at)
    with monkeypatch.context() as patch:
        patch.setattr(tuned, "save_file" if where == "before" else "sha256_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            pruned(model, text, out)
    told: list[str] = []
    monkeypatch.setattr(Lines, "go_on", lambda self, _: told.append(self.label))
    resumed = pruned(model, text, out, resume=True, show=progress)
    assert told.count("repairing the narrowed blocks") == at - 1, "which are not this run's pace"
    assert resumed["repair"] == whole[1]["repair"]
    assert weights(out / "dense") == weights(whole[0] / "dense")
    assert not out.with_name("out.work").exists()


def _damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [Path.unlink, _damaged])
def test_a_layer_that_was_spoilt_is_repaired_again(
    monkeypatch: pytest.MonkeyPatch, model: Path, text: Path, tmp_path: Path, whole: tuple[Path, dict[str, Any]],
    spoil: Callable[[Path], None],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(tuned, "save_file", Stop(tuned.save_file, 3))
        with pytest.raises(KeyboardInterrupt):
            pruned(model, text, out)
    spoil(tmp_path / "out.work" / "repaired" / "layer-0000.safetensors")
    pruned(model, text, out, resume=True)
    assert weights(out / "dense") == weights(whole[0] / "dense")


def test_a_layer_that_is_spoilt_while_the_folder_is_written_is_named(
    monkeypatch: pytest.MonkeyPatch, model: Path, text: Path, tmp_path: Path
) -> None:
    from crepe_deploy.structural import tyr as structural

    def then_spoilt(*arguments: Any) -> Any:
        plans, facts = inner(*arguments)
        _damaged(tmp_path / "out.work" / "repaired" / "layer-0001.safetensors")
        return plans, facts

    inner = structural.repaired
    monkeypatch.setattr(structural, "repaired", then_spoilt)
    with pytest.raises(VerifyError, match=r"layer-0001.*--resume repairs this layer again"):
        pruned(model, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--repair", "layer"), "known: block"),
        (("--repair", "block:steps=0"), "steps is 0"),
        (("--repair", "block", "--calib-samples", "3"), "3 are too few"),
        (("--repair", "block", "--calib-samples", "8", "--search-samples", "0", "--resume"), "nothing to resume"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], model: Path, text: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    options = ["tyr", str(model), "--out", str(tmp_path / "out"), "--calib", str(text), "--calib-length", "32"]
    assert run([*options, "--ffn-multiple", "16", *more]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, text: Path, tmp_path: Path
) -> None:
    options = ["tyr", str(model), "--out", str(tmp_path / "out"), "--calib", str(text), "--method", "uniform",
               "--calib-length", "64", "--ffn-multiple", "16", "--repair", REPAIR]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(tuned, "save_file", Stop(tuned.save_file, 2))
        assert run(options) == EXIT_RESUMABLE
    assert run([*options, "--resume"]) == 0
    assert "after repair" in capsys.readouterr().out
