"""Packed export: every bit comes back, the size is as promised, and what cannot be packed is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export
from safetensors.torch import load_file, save_file

from crepe_deploy.errors import CheckpointError, ConfigError, CrepeError, VerifyError
from crepe_deploy.packed.config import PackedConfig
from crepe_deploy.pattern import Pattern, Unstructured, parse_pattern
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.checkpoint import CheckpointReader, same_bits
from crepe_deploy.store.manifest import hash_folder, load_manifest, save_manifest, sha256_file, verify
from crepe_deploy.store.sources import resolve_model
from tests.export.spoilt import read_spoilt
from tests.pico import make_pico_llama


def pruned(
    folder: Path, pattern: str | Pattern = "2:4", *, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Path:
    """A pruned pico Llama under `folder`."""
    exclude = options.pop("exclude", None)
    model = make_pico_llama(folder / "model", dtype, **options)
    parsed = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    prune(resolve_model(str(model)), folder / "pruned", prune_config("magnitude", parsed, exclude=exclude), None)
    return folder / "pruned"


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [("1:4", torch.bfloat16), ("2:4", torch.float32), ("5:8", torch.bfloat16), ("16:32", torch.float16),
     ("0.5", torch.bfloat16), ("0.7", torch.float32)],
)  # fmt: skip
def test_round_trip_is_bit_identical(tmp_path: Path, pattern: str, dtype: torch.dtype) -> None:
    source = pruned(tmp_path, pattern, dtype=dtype)
    manifest = export_checkpoint(source, tmp_path / "packed", "packed")
    assert (manifest.format, manifest.stage) == ("packed", "export")
    assert manifest.parent == sha256_file(source / "manifest.json")
    verify(tmp_path / "packed")
    back = export_checkpoint(tmp_path / "packed", tmp_path / "back", "dense")
    assert back.format == "dense"
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "back")
    assert list(before.tensors) == list(after.tensors)
    assert all(same_bits(before.load(name), after.load(name)) for name in before.tensors)
    assert json.loads((source / "config.json").read_text()) == json.loads((tmp_path / "back/config.json").read_text())


def test_size_and_tensors_are_as_the_format_says(tmp_path: Path) -> None:
    manifest = export_checkpoint(pruned(tmp_path, "16:32"), tmp_path / "packed", "packed")
    assert manifest.metrics["size"]["weight_bytes_over_dense"] == 9 / 16
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert stored[name].shape == (0,)
    assert stored[name + "_values"].shape == (64, 64) and stored[name + "_mask"].shape == (64, 16)
    assert stored["lm_head.weight"].shape == (320, 64)
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "`crepe-nm`" in card and "| bytes of the packed layers, over dense (lower is better) | 0.5625 |" in card
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "crepe_nm", "version": 1, "n": 16, "m": 32, "ignore": ["lm_head"]}
    dense = CheckpointReader(tmp_path / "pruned")
    sizes = [sum(f.stat().st_size for f in reader.files) for reader in (CheckpointReader(tmp_path / "packed"), dense)]
    assert manifest.metrics["size"]["file_bytes_over_dense"] == pytest.approx(sizes[0] / sizes[1])


def test_kept_zeros_and_negative_zeros_survive(tmp_path: Path) -> None:
    source = pruned(tmp_path)
    name, file = "model.layers.0.mlp.up_proj.weight", source / "model.safetensors"
    tensors = load_file(file)
    weight = tensors[name]
    weight[0, torch.nonzero(weight[0])[:3]] = 0.0
    weight[1, torch.nonzero(weight[1])[:3]] = -0.0
    save_file(tensors, file, {"format": "pt"})
    rehash(source, {name: int((weight == 0).sum())})
    export_checkpoint(source, tmp_path / "packed", "packed")
    export_checkpoint(tmp_path / "packed", tmp_path / "back", "dense")
    found = load_file(tmp_path / "back" / "model.safetensors")[name]
    assert torch.signbit(found[1]).sum() == torch.signbit(weight[1]).sum()
    assert same_bits(found, weight)


def test_shards_keep_their_names(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "whole", torch.bfloat16)
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(sharded, max_shard_size="60KB")
    prune(resolve_model(str(sharded)), tmp_path / "pruned", prune_config("magnitude", "2:4"), None)
    manifest = export_checkpoint(tmp_path / "pruned", tmp_path / "packed", "packed")
    names = [path.name for path in CheckpointReader(tmp_path / "pruned").files]
    assert len(names) > 1
    assert [path.name for path in CheckpointReader(tmp_path / "packed").files] == names
    assert manifest.metrics["greedy"]["prompt"] is None  # this folder has no tokenizer
    export_checkpoint(tmp_path / "packed", tmp_path / "back", "dense")
    for name in names:
        assert sha256_file(tmp_path / "back" / name) == sha256_file(tmp_path / "pruned" / name)


def test_excluded_and_unpackable_layers_stay_dense_and_are_listed(tmp_path: Path) -> None:
    source = pruned(tmp_path, exclude=r"layers\.0\.self_attn", intermediate_size=48)
    manifest = export_checkpoint(source, tmp_path / "packed", "packed")
    assert manifest.metrics["left_dense"] == [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    ignore = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["ignore"]
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    assert ignore == sorted(["lm_head", *attention, "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"])


def test_a_matrix_pattern_is_refused_before_pruning(tmp_path: Path) -> None:
    model = resolve_model(str(make_pico_llama(tmp_path / "model")))
    config = prune_config("magnitude", Unstructured(0.5, "matrix"))
    with pytest.raises(ConfigError, match=r"0\.5/matrix cannot be packed.*--granularity row"):
        prune_and_export(model, tmp_path / "out", config, None, formats=("dense", "packed"))
    prune(model, tmp_path / "pruned", config, None)
    with pytest.raises(ConfigError, match=r"0\.5/matrix cannot be packed"):
        export_checkpoint(tmp_path / "pruned", tmp_path / "packed", "packed")
    assert not (tmp_path / "packed").exists() and not (tmp_path / "out").exists()


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "narrow", hidden_size=48, intermediate_size=80, num_attention_heads=4)
    prune(resolve_model(str(model)), tmp_path / "pruned", prune_config("magnitude", "2:4"), None)
    with pytest.raises(ConfigError, match="multiple of 32"):
        export_checkpoint(tmp_path / "pruned", tmp_path / "packed", "packed")
    (tmp_path / "fine").mkdir()
    export_checkpoint(pruned(tmp_path / "fine"), tmp_path / "packed", "packed")
    with pytest.raises(ConfigError, match="is a packed checkpoint"):
        export_checkpoint(tmp_path / "packed", tmp_path / "again", "packed")


def test_a_source_that_differs_from_its_manifest_is_refused(tmp_path: Path) -> None:
    source = pruned(tmp_path)
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(VerifyError, match=r"model\.safetensors differs"):
        export_checkpoint(source, tmp_path / "packed", "packed")


NAME = "model.layers.1.self_attn.o_proj.weight"


def _drop(suffix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: void(tensors.pop(NAME + suffix))


def void(_: object) -> None:
    return None


def _flip(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME + "_mask"][3, 2] ^= 1


def _shorten(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME + "_values"] = tensors[NAME + "_values"][:, :-4].contiguous()


def _flatten(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME + "_mask"] = tensors[NAME + "_mask"].flatten()


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME + "_values"][0, 0] = float("nan")


def _retype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[NAME + "_values"] = tensors[NAME + "_values"].double()


DAMAGES: dict[str, Callable[[dict[str, torch.Tensor]], None]] = {
    "values missing": _drop("_values"),
    "mask missing": _drop("_mask"),
    "wrong population": _flip,
    "short values": _shorten,
    "flat mask": _flatten,
    "nan": _nan,
    "wrong dtype": _retype,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_tensors_are_refused_by_name(tmp_path: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    export_checkpoint(pruned(tmp_path), tmp_path / "packed", "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, {"format": "pt"})
    rehash(tmp_path / "packed", {})
    with pytest.raises(CheckpointError, match=NAME.replace(".", r"\.")):
        export_checkpoint(tmp_path / "packed", tmp_path / "back", "dense")
    assert not (tmp_path / "back").exists()


def test_a_packed_tensor_gone_altogether_is_missing(tmp_path: Path) -> None:
    export_checkpoint(pruned(tmp_path), tmp_path / "packed", "packed")
    file = tmp_path / "packed" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith(NAME)}, file, {"format": "pt"})
    rehash(tmp_path / "packed", {})
    with pytest.raises(CheckpointError, match=r"o_proj\.weight' is missing"):
        export_checkpoint(tmp_path / "packed", tmp_path / "back", "dense")


def test_random_bytes_never_crash(tmp_path: Path) -> None:
    export_checkpoint(pruned(tmp_path), tmp_path / "packed", "packed")
    read_spoilt(tmp_path / "packed", tmp_path / "fuzz", NAME, PackedConfig(parse_pattern("2:4")))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": 4}, "version 4 is newer"),
        ({"version": "1"}, "is not a version"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"n": 3.0}, "no packed pattern"),
        ({"m": "in"}, "no packed pattern"),
        ({"ignore": "lm_head"}, "ignore"),
        ({"n": 0}, "not usable"),
    ],
)
def test_unknown_configs_are_refused(change: dict[str, Any], match: str) -> None:
    content = {"quant_method": "crepe_nm", "version": 1, "n": 2, "m": 4, "ignore": []} | change
    with pytest.raises(CrepeError, match=match):
        PackedConfig.from_dict(content)


def test_configs_round_trip() -> None:
    for pattern in ("2:4", "16:32", "0.7"):
        config = PackedConfig(parse_pattern(pattern), ("lm_head",))
        assert PackedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert PackedConfig(parse_pattern("0.7")).geometry(128) == (39, 128)  # floor(89.6) = 89 zeros


def rehash(folder: Path, zeros: dict[str, int]) -> None:
    """Make a folder changed by a test consistent with its manifest again."""
    manifest = load_manifest(folder)
    records = {
        name: record.model_copy(update={"zeros": zeros.get(name, record.zeros)})
        for name, record in manifest.tensors.items()
    }
    save_manifest(folder, manifest.model_copy(update={"files": hash_folder(folder), "tensors": records}))
