"""Writing: planned files that safetensors reads back, and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crepe_deploy.errors import CrepeError, DiskFullError, OutputError
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.files import atomic_folder, check_output, require_disk
from crepe_deploy.store.writing import CheckpointWriter, Planned


def plan_of(tensors: dict[str, torch.Tensor], files: int = 1) -> dict[str, Planned]:
    names = ["model.safetensors"] if files == 1 else [f"model-{i}.safetensors" for i in range(files)]
    return {
        name: Planned(names[i % files], tensor.dtype, tuple(tensor.shape))
        for i, (name, tensor) in enumerate(tensors.items())
    }


TENSORS = {
    "a": torch.randn(3, 5).bfloat16(),
    "b": torch.tensor(7.0),
    "c": torch.empty(0, 3),
    "d": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    "e": torch.randn(4, 6).T,
}


@pytest.mark.parametrize("files", [1, 2, 3])
def test_safetensors_reads_what_was_written_in_any_order(tmp_path: Path, files: int) -> None:
    with CheckpointWriter(tmp_path, plan_of(TENSORS, files)) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    found = {k: v for path in tmp_path.glob("*.safetensors") for k, v in load_file(path).items()}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name], tensor)
    assert set(CheckpointReader(tmp_path).tensors) == set(TENSORS)


def test_an_unwritten_tensor_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CrepeError, match="4 planned tensors"), CheckpointWriter(tmp_path, plan_of(TENSORS)) as writer:
        writer.write("a", TENSORS["a"])


@pytest.mark.parametrize("wrong", [torch.zeros(3, 5), torch.zeros(5, 3).bfloat16()])
def test_a_tensor_unlike_its_plan_is_an_error(tmp_path: Path, wrong: torch.Tensor) -> None:
    with pytest.raises(CrepeError, match="was planned as"), CheckpointWriter(tmp_path, plan_of(TENSORS)) as writer:
        writer.write("a", wrong)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, full)
    with (
        pytest.raises(DiskFullError, match="free some room"),
        atomic_folder(tmp_path / "out") as folder,
        CheckpointWriter(folder, plan_of(TENSORS)) as writer,
    ):
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="GB free"):
        require_disk(tmp_path / "not" / "yet", 1 << 60)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_neither_output_nor_partial(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_what_was_to_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    with pytest.raises(ValueError), atomic_folder(tmp_path / "out", overwrite=True):
        raise ValueError
    assert (tmp_path / "out" / "old").read_text() == "x"


def test_success_replaces_and_clears_the_remains_of_a_killed_run(tmp_path: Path) -> None:
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("x")
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("y")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_output_rules(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(OutputError, match="--overwrite"):
        check_output(model, overwrite=False)
    for out in (model, model / "inside", tmp_path):
        with pytest.raises(OutputError, match="one folder or lie inside"):
            check_output(out, overwrite=True, inputs=(model,))
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a folder"):
        check_output(tmp_path / "file", overwrite=True)
