"""The file of scales: what is read of it, and what of a stranger's is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crepe_deploy.errors import CheckpointError
from crepe_deploy.grid import Grid
from crepe_deploy.store.values import VALUES_NAME, planned_scales, read_values, scales_name, values_metadata
from tests.pico import make_pico_llama

UP = "model.layers.0.mlp.up_proj.weight"  # (128, 64)
DOWN = "model.layers.1.mlp.down_proj.weight"  # (64, 128)


def folder_with(tmp_path: Path, scales: dict[str, Tensor], metadata: Any = None) -> Path:
    folder = make_pico_llama(tmp_path / "m", torch.bfloat16)
    save_file(scales, folder / VALUES_NAME, values_metadata(4, 32) if metadata is None else metadata)
    return folder


def good() -> dict[str, Tensor]:
    grid = Grid(4, 32, torch.bfloat16)
    return {
        scales_name(UP): torch.full(planned_scales(grid, 128, 64).shape, 0.5, dtype=torch.bfloat16),
        scales_name(DOWN): torch.full(planned_scales(grid, 64, 128).shape, 0.25, dtype=torch.bfloat16),
    }


def test_what_is_written_is_read(tmp_path: Path) -> None:
    found = read_values(folder_with(tmp_path, good()))
    assert found.keys() == {UP, DOWN}
    assert found[UP][0] == found[DOWN][0] == Grid(4, 32, torch.bfloat16)
    assert torch.equal(found[UP][1], good()[scales_name(UP)]) and found[DOWN][1].shape == (64, 4)


def test_a_scale_for_each_row_and_a_folder_without(tmp_path: Path) -> None:
    rows = {scales_name(UP): torch.ones(128, 1, dtype=torch.bfloat16)}
    folder = folder_with(tmp_path, rows, values_metadata(8, None))
    assert read_values(folder)[UP][0] == Grid(8, None, torch.bfloat16)
    (folder / VALUES_NAME).unlink()
    assert read_values(folder) == {}


@pytest.mark.parametrize("metadata", [
    {}, {"bits": "4"}, {"group": "32"}, {"bits": "3", "group": "32"}, {"bits": "4", "group": "0"},
    {"bits": "4", "group": "-32"}, {"bits": "4", "group": "32 "}, {"bits": "4", "group": "9" * 400},
    {"bits": "4\n", "group": "32"}, {"bits": "4", "group": "32\n"}, {"bits": "4", "group": "\u0663\u0662"},
])  # fmt: skip
def test_metadata_that_say_no_grid(tmp_path: Path, metadata: dict[str, str]) -> None:
    with pytest.raises(CheckpointError, match="its metadata say bits"):
        read_values(folder_with(tmp_path, good(), metadata))


@pytest.mark.parametrize(("name", "tensor", "message"), [
    ("model.layers.9.mlp.up_proj.weight_scales", torch.ones(128, 2), "is of no weight"),
    (UP, torch.ones(128, 2), "is of no weight"),
    (scales_name("model.norm.weight"), torch.ones(64, 2), "which no weight"),
    (scales_name(UP), torch.ones(128, 3), "which no weight"),
    (scales_name(UP), torch.ones(128), "which no weight"),
    (scales_name(UP), torch.ones(128, 2, dtype=torch.float32), "its weight torch.bfloat16"),
    (scales_name(UP), torch.zeros(128, 2), "not positive"),
    (scales_name(UP), torch.full((128, 2), -1.0), "not positive"),
    (scales_name(UP), torch.full((128, 2), torch.inf), "not positive"),
    (scales_name(UP), torch.full((128, 2), torch.nan), "not positive"),
])  # fmt: skip
def test_scales_that_fit_no_weight(tmp_path: Path, name: str, tensor: Tensor, message: str) -> None:
    scales = tensor if "float32" in message or "its weight" in message else tensor.bfloat16()
    with pytest.raises(CheckpointError, match=message):
        read_values(folder_with(tmp_path, {name: scales}))


@pytest.mark.parametrize("size", [0, 4, 40, 200, -1])
def test_a_file_cut_short(tmp_path: Path, size: int) -> None:
    path = folder_with(tmp_path, good()) / VALUES_NAME
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=VALUES_NAME):
        read_values(path.parent)


def test_a_folder_a_link_out_and_a_link_to_nowhere_in_its_place(tmp_path: Path) -> None:
    path = folder_with(tmp_path, good()) / VALUES_NAME
    aside = path.rename(tmp_path / "elsewhere.safetensors")
    for target in (aside, tmp_path / "nothing"):
        path.symlink_to(target)
        with pytest.raises(CheckpointError, match="outside the model folder"):
            read_values(path.parent)
        path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_values(path.parent)


def test_weights_of_another_dtype_have_no_scales(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {scales_name(UP): torch.ones(128, 2, dtype=torch.float16)})
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, UP: weights[UP].to(torch.float64)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"its weight torch\.float64"):
        read_values(folder)
