"""`sparse-24-bitmask` checkpoints become ours bit by bit; what is damaged or quantised is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crepe_deploy.exporting.pipeline import export_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

import crepe_deploy  # noqa: F401  (registers the packed format with transformers)
from crepe_deploy.errors import CheckpointError, CrepeError, OutputError, UnsupportedModel
from crepe_deploy.store.checkpoint import CheckpointReader, same_bits
from crepe_deploy.store.manifest import verify
from tests.pico import make_pico_llama

SPARSITY = {"format": "sparse-24-bitmask", "global_sparsity": 0.4, "ignore": ["lm_head"], "sparsity_structure": "2:4",
            "targets": ["Linear"]}  # fmt: skip
QUANT: dict[str, Any] = {"config_groups": {}, "format": "dense", "kv_cache_scheme": None, "quant_method":
                         "compressed-tensors", "quantization_status": "compressed", "sparsity_config": SPARSITY,
                         "transform_config": {}, "version": "0.11.0"}  # fmt: skip
NAME = "model.layers.1.self_attn.o_proj"


def encode(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """2:4 by magnitude, one entry at a time: the dense result and the three tensors that stand for it."""
    rows, columns = weight.shape
    dense, values, octets = torch.zeros_like(weight), [], []
    for row in range(rows):
        bits = [0] * (-(-columns // 8) * 8)
        for start in range(0, columns, 4):
            group = range(start, start + 4)
            kept = sorted(sorted(group, key=lambda column: -abs(float(weight[row, column])))[:2])
            for column in kept:
                bits[column] = 1
                values.append(weight[row, column])
                dense[row, column] = weight[row, column]
        octets.append([sum(bits[8 * byte + bit] << bit for bit in range(8)) for byte in range(len(bits) // 8)])
    parts = {
        "compressed": torch.stack(values).reshape(rows, columns // 2),
        "bitmask": torch.tensor(octets, dtype=torch.uint8),
        "shape": torch.tensor([[rows], [columns]]),
    }
    return dense, parts


def orphan(folder: Path, quant: dict[str, Any] | None = None, *, lm_head: bool = False, **options: Any) -> Path:
    """Write `folder/dense`, a model pruned 2:4, and `folder/orphan`, the same as compressed-tensors stored it."""
    dtype = options.pop("dtype", torch.bfloat16)
    make_pico_llama(folder / "dense", dtype, **options)
    make_pico_llama(folder / "orphan", dtype, **options)
    dense = load_file(folder / "dense" / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for name, tensor in list(dense.items()):
        if not name.endswith("_proj.weight") and not (lm_head and name == "lm_head.weight"):
            stored[name] = tensor
            continue
        tensor[0, :3], tensor[1, :4] = 0.0, torch.tensor([-0.0, -0.0, 0.0, 0.0])
        dense[name], parts = encode(tensor)
        stored |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
    save_file(dense, folder / "dense" / "model.safetensors", {"format": "pt"})
    save_file(stored, folder / "orphan" / "model.safetensors", {"format": "pt"})
    configure(folder / "orphan", {"quantization_config": QUANT if quant is None else quant})
    return folder / "orphan"


def configure(folder: Path, change: dict[str, Any]) -> None:
    content = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(content))


def assert_same(folder: Path, expected: Path) -> None:
    found, wanted = CheckpointReader(folder), CheckpointReader(expected)
    assert set(found.tensors) == set(wanted.tensors)
    assert all(same_bits(found.load(name), wanted.load(name)) for name in wanted.tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_converts_to_both_formats_bit_by_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    source = orphan(tmp_path, dtype=dtype)
    manifest = export_checkpoint(source, tmp_path / "plain", "dense")
    assert_same(tmp_path / "plain", tmp_path / "dense")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config and "sparsity_config" not in config
    assert manifest.source.files.keys() == {"config.json", "model.safetensors"} and len(manifest.tensors) == 14
    record = manifest.tensors[f"{NAME}.weight"]
    assert (record.pattern, record.layer_error, record.shape) == ("2:4", None, (64, 64))
    assert record.zeros == int((load_file(tmp_path / "dense" / "model.safetensors")[f"{NAME}.weight"] == 0).sum())
    card = (tmp_path / "plain" / "README.md").read_text()
    assert "pruned to 2:4 with an unknown method" in card and "| calibration | unknown |" in card
    packed = export_checkpoint(source, tmp_path / "packed", "packed")
    assert packed.format == "packed" and packed.metrics["left_dense"] == []
    verify(tmp_path / "packed")
    export_checkpoint(tmp_path / "packed", tmp_path / "back", "dense")
    assert_same(tmp_path / "back", tmp_path / "dense")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "orphan", "plain", "packed", "back"}


def test_transformers_computes_the_same_from_the_packed_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    export_checkpoint(orphan(tmp_path, dtype=torch.float32), tmp_path / "packed", "packed")
    tokens = torch.arange(40).view(1, 40)
    logits = []
    for name in ("dense", "packed"):
        with torch.inference_mode():
            logits.append(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(tokens).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_shards_odd_widths_and_a_compressed_head(tmp_path: Path) -> None:
    source = orphan(tmp_path, {}, lm_head=True, intermediate_size=68)
    configure(source, {"sparsity_config": SPARSITY, "quantization_config": None})  # as older writers left it
    tensors = load_file(source / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.bitmask"].shape == (64, 9)
    (source / "model.safetensors").unlink()
    split: dict[str, dict[str, Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in tensors.items():
        split["b.safetensors" if name.endswith(("bitmask", "norm.weight")) else "a.safetensors"][name] = tensor
    for file, content in split.items():
        save_file(content, source / file, {"format": "pt"})
    weight_map = {name: file for file, content in split.items() for name in content}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    manifest = export_checkpoint(source, tmp_path / "packed", "packed")
    assert manifest.metrics["left_dense"] == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert manifest.source.notes["kept dense with zeros"] == "lm_head.weight"
    export_checkpoint(tmp_path / "packed", tmp_path / "back", "dense")
    assert_same(tmp_path / "back", tmp_path / "dense")


Damage = Callable[[dict[str, Tensor]], None]


def edit(part: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"]).contiguous()

    return damage


def drop(part: str) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{NAME}.{part}"]

    return damage


def _add(name: str) -> Damage:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.ones(64, 64, dtype=torch.bfloat16)

    return damage


DAMAGES: dict[str, tuple[Damage, type[CrepeError], str]] = {
    "population": (edit("bitmask", lambda bits: bits ^ torch.eye(64, 8, dtype=torch.uint8)), CheckpointError,
                   r"bitmask': row 0, columns 0 to 3 do not keep exactly 2 of 4"),
    "values missing": (drop("compressed"), CheckpointError, "compressed' is missing"),
    "mask missing": (drop("bitmask"), CheckpointError, "bitmask' is missing"),
    "shape missing": (drop("shape"), CheckpointError, "shape' is missing"),
    "short values": (edit("compressed", lambda t: t[:, 2:]), CheckpointError, r"compressed' has shape \(64, 30\)"),
    "flat values": (edit("compressed", lambda t: t.flatten()), CheckpointError, r"compressed' has shape \(2048,\)"),
    "narrow mask": (edit("bitmask", lambda t: t[:, 1:]), CheckpointError, r"bitmask' has shape \(64, 7\)"),
    "mask dtype": (edit("bitmask", lambda t: t.int()), CheckpointError, "bitmask' is torch.int32"),
    "nan": (edit("compressed", lambda t: t * float("nan")), CheckpointError, "compressed' holds NaN"),
    "shape value": (edit("shape", lambda t: t * 0 + 66), CheckpointError, r"shape' holds \[66, 66\]"),
    "shape rank": (edit("shape", lambda t: t[:1]), CheckpointError, "shape' holds"),
    "twice": (_add(f"{NAME}.weight"), CheckpointError, "stored both dense and compressed"),
    "fp8": (edit("compressed", lambda t: t.to(torch.float8_e4m3fn)), UnsupportedModel, "is torch.float8_e4m3fn"),
    "scale": (_add(f"{NAME}.weight_scale"), UnsupportedModel, "weight_scale' belongs to a quantised weight"),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged orphan; tests change copies of its files."""
    return orphan(tmp_path_factory.mktemp("bitmask24"))


def copy(whole: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(("damage", "error", "match"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_tensors_are_refused_by_name(
    tmp_path: Path, whole: Path, damage: Damage, error: type[CrepeError], match: str
) -> None:
    source = copy(whole, tmp_path / "orphan")
    tensors = load_file(source / "model.safetensors")
    damage(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=match) as caught:
        export_checkpoint(source, tmp_path / "out", "packed")
    assert NAME in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["orphan"]


GROUP = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}, "input_activations": None}}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"config_groups": GROUP}, r"quantisation or transforms \(group_0\)"),
        ({"config_groups": ["Linear"]}, r"\(config_groups\)"),
        ({"kv_cache_scheme": {"num_bits": 8}}, r"\(kv_cache_scheme\)"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, r"\(transform_config\)"),
        ({"quant_method": "gptq"}, r"\(quant_method gptq\)"),
        ({"sparsity_config": SPARSITY | {"format": "sparse-bitmask"}}, "sparsity format 'sparse-bitmask'"),
        ({"sparsity_config": SPARSITY | {"sparsity_structure": "unstructured"}}, "structure 'unstructured'"),
        ({"sparsity_config": {}}, "sparsity format 'None'"),
    ],
)
def test_other_configs_are_refused_by_name(tmp_path: Path, whole: Path, change: dict[str, Any], match: str) -> None:
    source = copy(whole, tmp_path / "orphan")
    configure(source, {"quantization_config": QUANT | change})
    with pytest.raises(UnsupportedModel, match=match):
        export_checkpoint(source, tmp_path / "out", "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["orphan"]


def test_a_stale_claim_over_dense_weights_is_named(tmp_path: Path) -> None:
    source = make_pico_llama(tmp_path / "model")
    configure(source, {"sparsity_config": SPARSITY})
    with pytest.raises(CheckpointError, match="no tensor is stored that way"):
        export_checkpoint(source, tmp_path / "out", "dense")
    configure(source, {"sparsity_config": {"format": "dense"}})
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        export_checkpoint(source, tmp_path / "out", "dense")


def test_the_source_is_never_the_place_of_the_copy(tmp_path: Path, whole: Path) -> None:
    source = copy(whole, tmp_path / "out.unpacked")
    with pytest.raises(OutputError, match="choose another"):
        export_checkpoint(source, tmp_path / "out", "dense")
    assert (source / "model.safetensors").exists() and not (tmp_path / "out").exists()
