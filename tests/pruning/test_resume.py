"""A stopped `prune` goes on with the bytes of an undisturbed run, pruning no finished block again."""

from __future__ import annotations

import errno
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest

from crepe_deploy.errors import CheckpointError, ConfigError, DiskFullError, NumericalError, OutputError, VerifyError
from crepe_deploy.progress import Lines
from crepe_deploy.pruning import prune as pruning
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.layer import LayerResult
from crepe_deploy.pruning.prune import prune
from crepe_deploy.pruning.replay import is_block
from crepe_deploy.store import journal as journals
from crepe_deploy.store.manifest import load_manifest, verify
from crepe_deploy.store.sources import Model, resolve_model
from crepe_deploy.store.work import JOURNAL, OUTPUT
from crepe_deploy.texts import CalibrationSet, calibration_windows, load_tokenizer
from tests.mutations import mutations
from tests.pico import make_pico_llama

LAYERS = 3
RUNS: dict[str, dict[str, Any]] = {
    "no text": {"method": "magnitude"},
    "dense feed": {"method": "wanda", "feed": "dense"},
    "pruned feed": {"method": "sparsegpt", "feed": "pruned"},
    "both feeds, every step": {"recipe": "best", "repair": "block:steps=2", "permute": "fold"},
    "allocation": {"method": "ria", "pattern": 0.5, "allocate": "alpha"},
    "values behind a recipe": {"recipe": "best", "values": "int4:group=32", "feed": "both"},
    "values alone": {"method": "wanda", "pattern": 0.0, "values": "int8"},
    "computing in another dtype": {"method": "wanda", "dtype": "float64"},
}


class Pruned:
    """Stands for `prune_block`: does what it does, `blocks` times, then raises; index: of each block that it did."""

    def __init__(self, blocks: int, error: BaseException) -> None:
        self.left, self.error, self.index = blocks, error, list[int]()
        self.prune_block = pruning.prune_block

    def __call__(self, plan: Any, index: int, *more: Any) -> Any:
        if not self.left:
            raise self.error
        self.left -= 1
        self.index.append(index)
        return self.prune_block(plan, index, *more)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return resolve_model(str(make_pico_llama(tmp_path_factory.mktemp("model") / "m", num_hidden_layers=LAYERS)))


def drawn(model: Model, text: Path, samples: int) -> CalibrationSet:
    return calibration_windows(text, load_tokenizer(model.folder), samples=samples, length=32)


@pytest.fixture(scope="module")
def windows(model: Model, text: Path) -> CalibrationSet:
    return drawn(model, text, 6)


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == ".safetensors"}


def stopped(
    monkeypatch: pytest.MonkeyPatch, blocks: int, model: Model, out: Path, config: Any, windows: Any,
    error: type[BaseException] | BaseException = KeyboardInterrupt, **more: Any,
) -> list[int]:  # fmt: skip
    """Prune so many blocks and stop; which ones were pruned."""
    raised = error("stop") if isinstance(error, type) else error
    stand_in = Pruned(blocks, raised)
    with monkeypatch.context() as patch, pytest.raises(type(raised)):
        patch.setattr(pruning, "prune_block", stand_in)
        prune(model, out, config, windows, **more)
    assert not out.exists()
    return stand_in.index


@pytest.mark.parametrize("run", RUNS)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    model: Model, windows: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    config, out = prune_config(**RUNS[run]), tmp_path / "out"
    whole = prune(model, tmp_path / "whole", config, windows)
    for index in range(LAYERS - 1):  # stopped after every single block
        assert stopped(monkeypatch, 1, model, out, config, windows, resume=index > 0) == [index]
    last = Pruned(1, AssertionError("a block was pruned again"))
    monkeypatch.setattr(pruning, "prune_block", last)
    resumed = prune(model, out, config, windows, resume=True)
    assert last.index == [LAYERS - 1]
    assert weights(out) == weights(tmp_path / "whole")
    assert (resumed.tensors, resumed.files) == (whole.tensors, whole.files)
    assert resumed.metrics.keys() == whole.metrics.keys()
    assert resumed.metrics.get("repair") == whole.metrics.get("repair")
    assert resumed.metrics["parity"] == whole.metrics["parity"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    verify(out)


@pytest.mark.parametrize("run", ["pruned feed", "allocation"])
def test_blocks_that_were_done_before_do_not_count_as_this_runs_pace(
    model: Model, windows: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    config, out, before = prune_config(**RUNS[run]), tmp_path / "out", list[float]()
    stopped(monkeypatch, LAYERS - 1, model, out, config, windows)
    lines = Lines("pruning", io.StringIO(), time.monotonic)
    monkeypatch.setattr(lines, "go_on", lambda done: before.append(done))
    monkeypatch.setattr(lines, "changed", lambda: before.append(-1.0))
    prune(model, out, config, windows, step=lines, resume=True)
    kept = [done for done in before if done >= 0]
    assert len(kept) == LAYERS - 1 + (run == "allocation") and kept == sorted(kept)
    assert before[: 2 * len(kept)] == [told for done in kept for told in (done, -1.0)], "they come first"


def test_what_a_stop_left_is_said_with_both_ways_on(
    model: Model, text: Path, windows: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = prune_config("wanda"), tmp_path / "out"
    stopped(monkeypatch, 2, model, out, config, windows)
    with pytest.raises(OutputError, match=r"go on with --resume, or start anew with --overwrite"):
        prune(model, out, config, windows)
    with pytest.raises(ConfigError, match="its config is"):
        prune(model, out, prune_config("ria"), windows, resume=True)
    with pytest.raises(ConfigError, match="its calibration is"):
        prune(model, out, config, drawn(model, text, 5), resume=True)
    monkeypatch.setattr(journals, "versions", lambda: {"torch": "0"})
    with pytest.raises(ConfigError, match="its versions is"):
        prune(model, out, config, windows, resume=True)
    monkeypatch.undo()
    assert stopped(monkeypatch, 1, model, out, config, windows, overwrite=True) == [0]
    with pytest.raises(ConfigError, match="nothing to resume"):
        prune(model, tmp_path / "other", config, windows, resume=True)


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize(
    ("error", "goes_on"),
    [
        (KeyboardInterrupt(), True),
        (DiskFullError("full"), True),
        (OSError(errno.EIO, "broken"), True),
        (MemoryError(), True),
        (VerifyError("a defect, to be looked into"), True),
        (NumericalError("the same would come again"), False),
        (CheckpointError("as would this"), False),
    ],
)
def test_what_would_come_again_leaves_nothing(
    model: Model, windows: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    error: BaseException, goes_on: bool, blocks: int,
) -> None:  # fmt: skip
    stopped(monkeypatch, blocks, model, tmp_path / "out", prune_config("wanda"), windows, error)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == (["out.work"] if goes_on and blocks else [])
    again = bool(left)
    assert prune(model, tmp_path / "out", prune_config("wanda"), windows, resume=again).metrics["parity"]


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone", "a bit of block 1"])
def test_weights_that_are_not_what_was_noted_are_pruned_again(
    model: Model, windows: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    config, out = prune_config("sparsegpt"), tmp_path / "out"
    prune(model, tmp_path / "whole", config, windows)
    stopped(monkeypatch, 2, model, out, config, windows)
    file = tmp_path / "out.work" / OUTPUT / "model.safetensors"
    if damage == "gone":
        file.unlink()
    elif damage.startswith("a bit"):
        spoil(file, "model.layers.1.mlp.up_proj.weight")
    else:
        with file.open("r+b") as content:
            content.truncate(file.stat().st_size // 2 if damage == "cut" else 0)
    counted = Pruned(LAYERS, AssertionError())
    monkeypatch.setattr(pruning, "prune_block", counted)
    prune(model, out, config, windows, resume=True)
    assert counted.index == ([1, 2] if damage.startswith("a bit") else counted.index)
    assert weights(out) == weights(tmp_path / "whole")


def spoil(file: Path, name: str) -> None:
    """Flip the last bit of a tensor."""
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    end = json.loads(data[8 : 8 + size])[name]["data_offsets"][1]
    data[8 + size + end - 1] ^= 1
    file.write_bytes(data)


def test_a_damaged_journal_is_refused_by_line(
    model: Model, windows: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of a block spoilt in every place: not taken, or one that a run can be ended with."""
    config, out = prune_config("wanda"), tmp_path / "out"
    stopped(monkeypatch, 1, model, out, config, windows)
    journal = tmp_path / "out.work" / JOURNAL
    header, line = journal.read_text().splitlines()
    block = json.loads(line)["value"]
    names, tensors = set(block["layers"]), block["sha256"].keys()
    assert is_block(block, names, tensors)
    taken = [spoilt for _, spoilt in mutations(block) if is_block(spoilt, names, tensors)]
    assert all(LayerResult(**layer).notes.keys() for one in taken for layer in one["layers"].values() if layer["notes"])
    assert len(taken) < len(list(mutations(block))) / 2
    del block["layers"][min(names)]
    journal.write_text(f"{header}\n{json.dumps({'kind': 'block', 'key': '0', 'value': block})}\n")
    with pytest.raises(ConfigError, match="line 2 is no result of block"):
        prune(model, out, config, windows, resume=True)
    assert (tmp_path / "out.work" / OUTPUT).is_dir()


def test_a_second_writer_is_refused(
    model: Model, windows: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(*_: Any) -> Any:
        monkeypatch.undo()
        prune(model, tmp_path / "out", prune_config("wanda"), windows)

    monkeypatch.setattr(pruning, "prune_block", second)
    with pytest.raises(OutputError, match="another run is writing"):
        prune(model, tmp_path / "out", prune_config("wanda"), windows)


def test_the_manifest_counts_the_seconds_of_both_runs(
    model: Model, windows: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = prune_config("wanda"), tmp_path / "out"
    stopped(monkeypatch, 2, model, out, config, windows)
    journal = tmp_path / "out.work" / JOURNAL
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    lines[1]["value"]["seconds"]["score"] = 1e6
    journal.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    prune(model, out, config, windows, resume=True)
    assert load_manifest(out).metrics["seconds"]["score"] >= 1e6
