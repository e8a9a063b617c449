"""A stopped `export` goes on: no file of weights that was whole is written again, and every byte is the same."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crepe_deploy.exporting.formats.int8 import _is_rounding
from crepe_deploy.exporting.frame import run as frame
from crepe_deploy.exporting.pipeline import export_checkpoint
from transformers import AutoModelForCausalLM

from crepe_deploy.cli import run
from crepe_deploy.errors import ConfigError, DiskFullError, OutputError, ParityError
from crepe_deploy.progress import Lines
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store import journal as journals
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.journal import Journal, open_journal
from crepe_deploy.store.manifest import verify
from crepe_deploy.store.pieces import SHARD, Pieces
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.store.work import JOURNAL, OUTPUT
from tests.export.sliced import assembled
from tests.mutations import mutations
from tests.pico import make_pico_llama
from tests.structural.random_plans import UNEVEN

# What is exported to what, with which options.
EXPORTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "dense": ("pruned", "dense", {}),
    "packed": ("pruned", "packed", {}),
    "unpacked": ("packed", "dense", {}),
    "int8": ("pruned", "int8", {}),
    "deci": ("widths", "deci", {}),
    "gguf": ("pruned", "gguf", {}),
    "gguf of packed": ("packed", "gguf", {"quantise": "q8_0"}),
    "onnx": ("pruned", "onnx", {}),
    "onnx genai": ("pruned", "onnx", {"flavor": "genai", "precision": "int4"}),
}


class Struck:
    """Ends a run with `error` once its journal has `pieces` more lines."""

    def __init__(self, pieces: int, error: BaseException) -> None:
        self.left, self.error, self.add = pieces, error, Journal.add

    def __call__(self, journal: Journal, *line: Any) -> None:
        self.add(journal, *line)
        self.left -= 1
        if not self.left:
            raise self.error


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    model = make_pico_llama(folder / "model")
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder / "sharded", max_shard_size="200KB")
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / "sharded" / path.name).write_bytes(path.read_bytes())
    prune(resolve_model(str(folder / "sharded")), folder / "pruned", prune_config("magnitude"), None)
    export_checkpoint(folder / "pruned", folder / "packed", "packed")
    assert len(CheckpointReader(folder / "pruned").files) > 1
    (folder / "widths").mkdir()
    widths, _ = assembled(folder / "widths", "llama", UNEVEN, "per-layer")
    return {"pruned": folder / "pruned", "packed": folder / "packed", "widths": widths}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stopped(monkeypatch: pytest.MonkeyPatch, pieces: int, error: BaseException, work: Callable[[], object]) -> None:
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        struck = Struck(pieces, error)
        patch.setattr(Journal, "add", lambda self, *line: struck(self, *line))
        work()


@pytest.mark.parametrize("name", EXPORTS)
def test_it_goes_on_from_every_piece_to_the_same_bytes(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source, format, options = EXPORTS[name]
    if "genai" in name:
        pytest.importorskip("onnxruntime_genai")
    out = tmp_path / "out"

    def export(out: Path, **more: bool) -> None:
        export_checkpoint(sources[source], out, format, options=options, **more)

    lines: list[Any] = []
    with monkeypatch.context() as patch:
        add = Journal.add
        patch.setattr(Journal, "add", lambda self, *line: (lines.append(line), add(self, *line)))
        export(tmp_path / "whole")
    for number in range(len(lines)):  # after every single one: what was done before is not done again
        stopped(monkeypatch, 1, KeyboardInterrupt(), lambda number=number: export(out, resume=number > 0))
        assert not out.exists()
    with monkeypatch.context() as patch, pytest.raises(DiskFullError):
        patch.setattr(frame, "finish", lambda *_: (_ for _ in ()).throw(DiskFullError("full")))
        export(out, resume=True)
    monkeypatch.setattr(Journal, "add", lambda *_: pytest.fail("a piece was made again"))
    export(out, resume=True)
    assert files(out) == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    verify(out)


@pytest.mark.parametrize("name", ["packed", "int8", "deci", "gguf"])
def test_what_was_written_before_is_told_and_is_not_this_runs_pace(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (source, format, _), out, before = EXPORTS[name], tmp_path / "out", list[int]()
    stopped(monkeypatch, 1, KeyboardInterrupt(), lambda: export_checkpoint(sources[source], out, format))
    lines = Lines("exporting", io.StringIO(), time.monotonic)
    monkeypatch.setattr(lines, "go_on", before.append)
    export_checkpoint(sources[source], out, format, step=lines, resume=True)
    assert before == list(range(1, len(before) + 1)) != []
    assert lines.estimate.done == lines.estimate.total


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone", "a bit"])
@pytest.mark.parametrize("format", ["dense", "int8", "gguf"])
def test_a_piece_that_is_not_what_was_noted_is_made_again(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, format: str
) -> None:
    out = tmp_path / "out"
    export_checkpoint(sources["pruned"], tmp_path / "whole", format)
    stopped(monkeypatch, 1, KeyboardInterrupt(), lambda: export_checkpoint(sources["pruned"], out, format))
    (file,) = [
        tmp_path / "out.work" / OUTPUT / json.loads(line)["key"].partition("/")[2]
        for line in (tmp_path / "out.work" / JOURNAL).read_text().splitlines()[1:]
    ]
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        flipped = data[:-1] + bytes([data[-1] ^ 1])
        file.write_bytes({"cut": data[: len(data) // 2], "emptied": b"", "a bit": flipped}[damage])
    (tmp_path / "out.work" / OUTPUT / "half.json").write_text("{")  # what no piece accounts for
    export_checkpoint(sources["pruned"], out, format, resume=True)
    assert files(out) == files(tmp_path / "whole")


def test_what_a_stop_left_is_said_and_nothing_else_goes_on_from_it(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def export(source: str = "pruned", format: str = "packed", **more: Any) -> None:
        export_checkpoint(sources[source], out, format, **more)

    with pytest.raises(ConfigError, match="nothing to resume"):
        export(resume=True)
    assert not list(tmp_path.iterdir())
    stopped(monkeypatch, 1, KeyboardInterrupt(), export)
    with pytest.raises(OutputError, match=r"go on with --resume, or start anew with --overwrite"):
        export()
    with pytest.raises(ConfigError, match="its format is 'packed', this one's 'int8'"):
        export(format="int8", resume=True)
    with pytest.raises(ConfigError, match="its base_model is None"):
        export(base_model="a/b", resume=True)
    with pytest.raises(ConfigError, match="its source is"):
        export("widths", "packed", resume=True)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="its versions is"):
        patch.setattr(journals, "versions", lambda: {"torch": "0"})
        export(resume=True)
    stopped(monkeypatch, 1, KeyboardInterrupt(), lambda: export(overwrite=True))
    with pytest.raises(OutputError, match="another run is writing"):
        _while_running(monkeypatch, export)
    export(resume=True)
    verify(out)


def _while_running(monkeypatch: pytest.MonkeyPatch, export: Callable[..., None]) -> None:
    """A second run while the first is at its end."""
    with monkeypatch.context() as patch:
        patch.setattr(frame, "finish", lambda *_: export(resume=True))
        export(resume=True)


def test_what_computes_something_else_is_kept_and_not_gone_on_from(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> None:
        raise ParityError("other bits")

    with monkeypatch.context() as patch, pytest.raises(ParityError, match="kept in"):
        patch.setattr(frame, "finish", wrong)
        export_checkpoint(sources["pruned"], tmp_path / "out", "packed")
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]


def test_a_record_spoilt_anywhere_is_refused_or_one_of_this_run(tmp_path: Path) -> None:
    value = {"sha256": {"a": "0", "a_scale": "1"}, "notes": {"a": [0.5, 3]}}
    info = next(iter(CheckpointReader(make_pico_llama(tmp_path / "m"))))
    path, taken = tmp_path / "journal", 0

    def noted(name: str, note: Any) -> bool:
        return _is_rounding(note, info) if name == "a" else note is None

    for _, spoilt in mutations(value):
        open_journal(path, {}, resume=False, overwrite=True).add(SHARD, "int8/x", spoilt)
        try:
            entry = Pieces(open_journal(path, {}, resume=True), "int8").shard("x", ["a", "a_scale"], noted)
        except ConfigError as error:
            assert "line 2" in str(error)
        else:
            taken += 1
            assert entry is None or torch.tensor(entry["notes"]["a"]).isfinite().all()
    assert taken < len(list(mutations(value))) / 2


def test_the_command_says_that_it_was_stopped(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    argv = ["export", str(sources["pruned"]), "--format", "packed", "--out", str(tmp_path / "out")]
    struck = Struck(1, KeyboardInterrupt())
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", lambda self, *line: struck(self, *line))
        assert run(argv) == 75
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert run([*argv, "--resume"]) == 0
    verify(tmp_path / "out")
