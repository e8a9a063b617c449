"""Folders with scales beside their weights are packed as codes: every bit comes back, the size is as promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export
from crepe_deploy.serve.launcher import ServeOptions, check
from safetensors.torch import load_file, save_file

from crepe_deploy.api.inspect import inspect
from crepe_deploy.api.plan import plan
from crepe_deploy.api.verify import verify
from crepe_deploy.errors import CheckpointError, ConfigError
from crepe_deploy.packed.config import PackedConfig, Values, packed_config
from crepe_deploy.pattern import NM, Unstructured
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.checkpoint import CheckpointReader, same_bits
from crepe_deploy.store.manifest import hash_folder, load_manifest, save_manifest
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.store.values import VALUES_NAME, read_values
from tests.export.spoilt import read_spoilt
from tests.pico import make_pico_llama

NAME = "model.layers.1.mlp.down_proj.weight"
BF16 = torch.bfloat16


def pruned(
    folder: Path, pattern: str, values: str, dtype: torch.dtype = BF16, exclude: str | None = None, **sizes: int
) -> Path:
    """A pico Llama on a grid, under `folder`."""
    model = resolve_model(str(make_pico_llama(folder / "model", dtype, **sizes)))
    config = prune_config("magnitude", pattern, values=f"{values},rounding=nearest", exclude=exclude)
    prune(model, folder / "pruned", config, None)
    return folder / "pruned"


@pytest.mark.parametrize(
    ("pattern", "values", "dtype"),
    [("16:32", "int4:group=128", BF16), ("2:4", "int8:damping=0.01", torch.float16), ("13:32", "int4:group=32", BF16),
     ("0.7", "int4:group=64", torch.float32), ("0", "int4:group=128", BF16), ("0", "int8:damping=0.01", BF16)],
)  # fmt: skip
def test_round_trip_is_bit_identical(tmp_path: Path, pattern: str, values: str, dtype: torch.dtype) -> None:
    source = pruned(tmp_path, pattern, values, dtype)
    manifest = export_checkpoint(source, tmp_path / "packed", "packed")
    verify(tmp_path / "packed")
    assert not (tmp_path / "packed" / VALUES_NAME).exists()
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    group = None if "int8" in values else int(values.partition("=")[2])
    assert (config["version"], config["values"]) == (3, {"bits": int(values[3]), "group": group})
    assert PackedConfig.from_dict(config).to_dict() == config
    export_checkpoint(tmp_path / "packed", tmp_path / "back", "dense")
    verify(tmp_path / "back")
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "back")
    assert list(before.tensors) == list(after.tensors)
    assert all(same_bits(before.load(name), after.load(name)) for name in before.tensors)
    scales, again = read_values(source), read_values(tmp_path / "back")
    assert scales.keys() == again.keys()
    assert all(scales[name][0] == again[name][0] and same_bits(scales[name][1], again[name][1]) for name in scales)
    repacked = export_checkpoint(tmp_path / "back", tmp_path / "again", "packed")
    assert repacked.files["model.safetensors"] == manifest.files["model.safetensors"]
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "packed" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("pattern", "values", "bits", "parts"),
    [("16:32", "int4", 3.125, {"_codes": (64, 64), "_scales": (64, 2), "_mask": (64, 32)}),
     ("0", "int4", 4.125, {"_codes": (64, 128), "_scales": (64, 2)}),
     ("16:32", "int8", 5 + 16 / 256, {"_codes": (64, 128), "_scales": (64, 1), "_mask": (64, 32)})],
)  # fmt: skip
def test_bytes_on_disk(tmp_path: Path, pattern: str, values: str, bits: float, parts: dict[str, Any]) -> None:
    only = r"layers\.\d+\.(self_attn|mlp\.(gate|up))"  # the others have 64 columns, half a group
    step = "int4:group=128" if values == "int4" else "int8:damping=0.01"
    source = pruned(tmp_path, pattern, step, exclude=only, intermediate_size=256)
    manifest = export_checkpoint(source, tmp_path / "packed", "packed")
    size = manifest.metrics["size"]
    assert size["weight_bytes_over_dense"] * 16 == pytest.approx(bits)
    assert size["values"] == ("int4:group=128" if values == "int4" else "int8")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert {name.removeprefix(NAME): tuple(part.shape) for name, part in stored.items() if name.startswith(NAME)} == {
        "": (0,), **parts,
    }  # fmt: skip
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "version 3 of the format `crepe-nm`" in card and "vllm serve" not in card


def test_plan_predicts_the_bytes_and_inspect_names_the_values(tmp_path: Path) -> None:
    for pattern, values in (("16:32", "int4:group=32"), ("0", "int8:damping=0.01")):
        place = tmp_path / pattern.replace(":", "-")
        export_checkpoint(pruned(place, pattern, values), place / "packed", "packed")
        predicted = plan(place / "model", sparsity=pattern, values=values, calib_samples=4, calib_length=32)
        written = CheckpointReader(place / "packed")
        assert predicted["packed_checkpoint_bytes"] == sum(info.size_bytes for info in written)
        assert predicted["values"] == values
        size = load_manifest(place / "packed").metrics["size"]
        assert predicted["pruned_tensors_packed_over_dense"] == size["weight_bytes_over_dense"]
        rows = {row["name"]: row for row in inspect(place / "packed").tensors}
        dense = {row["name"]: row for row in inspect(place / "pruned").tensors}
        assert rows.keys() == dense.keys()
        assert rows[NAME]["packed"] and rows[NAME]["values"] == values.replace(":damping=0.01", "")
        assert all({**dense[name], "packed": True} == row for name, row in rows.items() if "packed" in row)


def test_layers_of_their_own_pattern(tmp_path: Path) -> None:
    source = pruned(tmp_path, "16:32", "int4:group=32")
    manifest, file = load_manifest(source), source / "model.safetensors"
    record = manifest.tensors[NAME].model_copy(update={"pattern": "0/row"})  # true of every weight
    files = hash_folder(source)
    save_manifest(source, manifest.model_copy(update={"tensors": {**manifest.tensors, NAME: record}, "files": files}))
    export_checkpoint(source, tmp_path / "packed", "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["version"] == 3
    assert config["overrides"] == {NAME.removesuffix(".weight"): {"n": None, "m": "in", "sparsity": 0.0}}
    assert NAME + "_mask" not in CheckpointReader(tmp_path / "packed")
    back = export_checkpoint(tmp_path / "packed", tmp_path / "back", "dense")
    assert back.files["model.safetensors"] == manifest.files["model.safetensors"] and file.exists()


def test_scales_of_other_weights_are_refused(tmp_path: Path) -> None:
    source = pruned(tmp_path, "2:4", "int4:group=32")
    tensors = load_file(source / "model.safetensors")
    tensors[NAME][3] *= 1.5
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    save_manifest(source, load_manifest(source).model_copy(update={"files": hash_folder(source)}))
    with pytest.raises(CheckpointError, match=rf"'{NAME}'.*not on the grid.*changed after values\.safetensors"):
        export_checkpoint(source, tmp_path / "packed", "packed")
    assert not (tmp_path / "packed").exists()


def test_nothing_pruned_is_packed_only_where_there_are_values(tmp_path: Path) -> None:
    model = resolve_model(str(make_pico_llama(tmp_path / "model", BF16)))
    with pytest.raises(ConfigError, match="keeps everything; there is nothing to pack"):
        prune_and_export(model, tmp_path / "out", prune_config("magnitude", 0.0), None, formats=("packed",))
    config = prune_config("magnitude", 0.0, values="int4:rounding=nearest")
    report = prune_and_export(model, tmp_path / "out", config, None, formats=("packed", "dense"))
    assert report["formats"]["packed"]["size"]["values"] == "int4:group=128"


def test_vllm_is_refused_by_name_before_anything_starts(tmp_path: Path) -> None:
    export_checkpoint(pruned(tmp_path, "16:32", "int4:group=32"), tmp_path / "packed", "packed")
    said = "vLLM cannot serve int4:group=32 values.*version 3.*transformers.*--format dense"
    with pytest.raises(ConfigError, match=said):
        check(ServeOptions(tmp_path / "packed", port=0))
    check(ServeOptions(tmp_path / "pruned", port=0))


def damaged(stored: dict[str, torch.Tensor], part: str) -> None:
    if part == "_codes":
        stored[NAME + part] = stored[NAME + part][:, 1:].contiguous()
    elif part == "_scales":
        stored[NAME + part][0, 0] = torch.inf
    else:
        stored[NAME + part][0, 0] ^= 1


@pytest.mark.parametrize("part", ["_codes", "_scales", "_mask"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_part_that_is_spoilt_or_missing_is_named(tmp_path: Path, part: str, gone: bool) -> None:
    export_checkpoint(pruned(tmp_path, "16:32", "int4:group=32"), tmp_path / "packed", "packed")
    file = tmp_path / "packed" / "model.safetensors"
    stored = load_file(file)
    if gone:
        del stored[NAME + part]
    else:
        damaged(stored, part)
    save_file(stored, file, {"format": "pt"})
    manifest = load_manifest(tmp_path / "packed")
    save_manifest(tmp_path / "packed", manifest.model_copy(update={"files": hash_folder(tmp_path / "packed")}))
    with pytest.raises(CheckpointError, match=f"{NAME}{part}"):
        export_checkpoint(tmp_path / "packed", tmp_path / "back", "dense")
    with pytest.raises(CheckpointError, match=f"{NAME}{part}"):
        inspect(tmp_path / "packed")


def test_random_bytes_never_crash(tmp_path: Path) -> None:
    export_checkpoint(pruned(tmp_path, "2:4", "int4:group=32"), tmp_path / "packed", "packed")
    read_spoilt(tmp_path / "packed", tmp_path / "fuzz", NAME, PackedConfig(NM(2, 4), values=Values(4, 32)))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"version": 1}, "version 1 has no 'values'"),
    ({"version": 2}, "version 2 has no 'values'"),
    ({"values": None}, "does not give 'bits' and 'group'"),
    ({"values": {"bits": 4}}, "does not give 'bits' and 'group'"),
    ({"values": {"bits": 3, "group": 32}}, "values of 3 bits"),
    ({"values": {"bits": True, "group": 32}}, "values of True bits"),
    ({"values": {"bits": 4, "group": 48}}, "groups of 48 columns"),
    ({"values": {"bits": 4, "group": 0}}, "groups of 0 columns"),
    ({"values": {"bits": 4, "group": "128"}}, "groups of '128' columns"),
]


@pytest.mark.parametrize(("change", "match"), WRONG)
def test_wrong_configs_are_refused(change: dict[str, Any], match: str) -> None:
    content = packed_config(NM(16, 32), ("lm_head",), values=Values(4, 128)).to_dict()
    assert PackedConfig.from_dict(content) == PackedConfig(NM(16, 32), ("lm_head",), {}, Values(4, 128))
    with pytest.raises(CheckpointError, match=match):
        PackedConfig.from_dict(content | change)


def test_older_configs_are_as_they_were() -> None:
    for config in (PackedConfig(NM(2, 4)), PackedConfig(Unstructured(0.5), (), {"a": Unstructured(0.25)})):
        assert "values" not in config.to_dict() and config.to_dict()["version"] < 3
        config.refuse_values("anything")
