"""Reading: every damaged, unsafe or incomplete folder is refused by name before any data is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from crepe_deploy.errors import CheckpointError
from crepe_deploy.store.checkpoint import INDEX_NAME, CheckpointReader, read_header


def make_folder(root: Path, shards: int = 1) -> dict[str, torch.Tensor]:
    """A folder of `shards` files; returns its tensors by name."""
    root.mkdir(exist_ok=True)
    tensors = {f"t{i}": torch.randn(3, 4 + i).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(4)}
    if shards == 1:
        save_file(tensors, root / "model.safetensors")
        return tensors
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: value for i, (key, value) in enumerate(tensors.items()) if i % shards == shard}
        save_file(part, root / name)
        weight_map |= dict.fromkeys(part, name)
    (root / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def edit_index(root: Path, **entries: str) -> None:
    index = json.loads((root / INDEX_NAME).read_text())
    index["weight_map"] |= entries
    (root / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2])
def test_loads_what_safetensors_wrote(tmp_path: Path, shards: int) -> None:
    tensors = make_folder(tmp_path / "m", shards)
    reader = CheckpointReader(tmp_path / "m")
    assert set(reader.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(reader.load(name), tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.uint8, torch.bool, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3)])
def test_every_dtype_and_odd_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.ones(shape).to(dtype)
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    loaded = CheckpointReader(tmp_path).load("t")
    assert loaded.dtype == dtype
    assert loaded.shape == tensor.shape
    assert torch.equal(loaded, tensor)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: this shard is missing"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    make_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        CheckpointReader(tmp_path)


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"t": 1},
        {"t": {"dtype": "F32", "shape": [1]}},
        {"t": {"dtype": "WHAT", "shape": [1], "data_offsets": [0, 4]}},
        {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"t": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
        {"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
    ],
)  # fmt: skip
def test_wrong_header_is_refused(tmp_path: Path, header: object) -> None:
    path = header_file(tmp_path / "x.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_header(path)


def test_huge_header_claim_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        read_header(path)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
def test_random_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError):
        read_header(path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/etc/passwd", "sub/x.safetensors", "", ".."])
def test_index_pointing_outside_is_refused(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path, 2)
    edit_index(tmp_path, t0=name)
    with pytest.raises(CheckpointError, match="points outside the folder"):
        CheckpointReader(tmp_path)


def test_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", 2)
    shard = tmp_path / "m" / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="is a link to"):
        CheckpointReader(tmp_path / "m")


def test_hub_cache_layout_is_accepted(tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.parent.mkdir()
    make_folder(snapshot)
    (tmp_path / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(tmp_path / "blobs" / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert len(CheckpointReader(snapshot).tensors) == 4


def test_index_that_disagrees_with_the_shards(tmp_path: Path) -> None:
    make_folder(tmp_path, 2)
    edit_index(tmp_path, ghost="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'ghost' is not in"):
        CheckpointReader(tmp_path)


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="save_pretrained"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_named(tmp_path: Path, value: float) -> None:
    save_file({"bad": torch.tensor([1.0, value])}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="'bad' holds NaN or infinite"):
        CheckpointReader(tmp_path).load_finite("bad")


def test_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    make_folder(tmp_path)
    reader = CheckpointReader(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="truncated"):
        for name in reader.tensors:
            reader.load(name)
