"""Writing: planned files that safetensors reads back, and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from crepe_deploy.errors import CrepeError, DiskFullError
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.files import require_disk
from crepe_deploy.store.folders import atomic_folder
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
