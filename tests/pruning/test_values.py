"""`--values` from end to end: what is written is code * scale, its scales lie beside it, and nothing goes stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from crepe_deploy.cli import run as command
from crepe_deploy.errors import ConfigError, VerifyError
from crepe_deploy.grid import Grid, codes_of
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.checkpoint import INDEX_NAME, SINGLE_NAME, CheckpointReader
from crepe_deploy.store.manifest import Manifest, hash_folder, load_manifest, save_manifest
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.store.values import VALUES_NAME, check_values, read_values
from crepe_deploy.texts import calibration_windows, load_tokenizer
from tests.pico import QUICK_TYR, VOCAB, make_pico, make_pico_llama
from tests.pico_moe import make_moe

GPT2 = tf.GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1)
RUNS: dict[str, dict[str, Any]] = {
    "int4 behind the recipe": {"recipe": "best", "pattern": "16:32", "values": "int4:group=32"},
    "int8 behind the recipe": {"recipe": "best", "pattern": "2:4", "values": "int8"},
    "int4 to nearest, no text": {"method": "magnitude", "pattern": "2:4", "values": "int4:rounding=nearest"},
    "a share of each row": {"method": "wanda", "pattern": 0.5, "values": "int4:group=64"},
    "behind a method that updates": {"method": "sparsegpt", "pattern": "16:32", "values": "int4"},
    "nothing pruned": {"method": "crepe", "pattern": 0.0, "values": "int4:group=32"},
    "nothing pruned, fitted": {"recipe": "best", "pattern": 0.0, "values": "int4:group=32"},
    "nothing pruned, to nearest": {"method": "crepe", "pattern": 0.0, "values": "int8:rounding=nearest"},
    "both feeds with values alone": {"method": "wanda", "pattern": "2:4", "values": "int8", "feed": "both"},
    "computing in another dtype": {"recipe": "best", "pattern": "2:4", "values": "int4", "dtype": "float32"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("llama") / "m", torch.bfloat16)


def pruned(model: Path, out: Path, text: Path, **options: Any) -> Manifest:
    config = prune_config(**options)
    windows = calibration_windows(text, load_tokenizer(model), 16, 32) if config.needs_text else None
    return prune(resolve_model(str(model)), out, config, windows)


@pytest.mark.parametrize("name", RUNS)
def test_every_weight_is_code_times_scale(tmp_path: Path, llama: Path, text: Path, name: str) -> None:
    manifest = pruned(llama, tmp_path / "out", text, **RUNS[name])
    step = RUNS[name]["values"]
    assert manifest.config["values"] == step
    assert manifest.config["resolved_steps"]["values"]["class"] == f"Int{step[3]}"
    reader, found = CheckpointReader(tmp_path / "out"), read_values(tmp_path / "out")
    assert found.keys() == manifest.tensors.keys()
    assert reader.tensors.keys() == CheckpointReader(llama).tensors.keys()
    group = None if "int8" in step else int(step[11:]) if "group" in step else 128
    for key, (grid, scales) in found.items():
        assert grid == Grid(int(step[3]), group, torch.bfloat16)
        weight = reader.load(key)
        assert codes_of(weight, scales, grid).any()
        assert not (weight.view(torch.int16) == -32768).any(), "a negative zero has no code"
    index = json.loads((tmp_path / "out" / INDEX_NAME).read_text())
    assert set(index["weight_map"].values()) == {SINGLE_NAME}
    assert index["metadata"]["total_size"] == sum(info.size_bytes for info in reader)
    assert command(["verify", str(tmp_path / "out")]) == 0


def test_what_was_given_without_values_is_as_it_was(tmp_path: Path, llama: Path) -> None:
    pruned(llama, tmp_path / "out", llama, method="magnitude")
    record = load_manifest(tmp_path / "out").config
    assert "values" not in record and "values" not in record["resolved_steps"]
    assert not list((tmp_path / "out").glob("*values*")) and not (tmp_path / "out" / INDEX_NAME).exists()


def test_scales_follow_the_rows_that_a_fold_reorders(tmp_path: Path, llama: Path, text: Path) -> None:
    manifest = pruned(llama, tmp_path / "out", text, method="ria", permute="fold", values="int4:group=32")
    check_values(tmp_path / "out")
    plain = pruned(llama, tmp_path / "plain", text, method="ria", values="int4:group=32")
    key = "model.layers.0.mlp.up_proj.weight"
    (_, mine), (_, unmoved) = (read_values(tmp_path / name)[key] for name in ("out", "plain"))
    assert plain.tensors[key] == manifest.tensors[key]
    assert not torch.equal(mine, unmoved) and torch.equal(mine.sort(0).values, unmoved.sort(0).values)


def test_layers_stored_the_other_way_round(tmp_path: Path, text: Path) -> None:
    model = make_pico(tmp_path / "m", GPT2, torch.bfloat16)
    manifest = pruned(model, tmp_path / "out", text, recipe="best", pattern="2:4", values="int4:group=32")
    found = read_values(tmp_path / "out")
    key = "transformer.h.0.mlp.c_fc.weight"
    assert manifest.tensors[key].transposed and manifest.tensors[key].shape == (64, 256)
    assert found[key][1].shape == (256, 2)
    assert command(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(("options", "message"), [
    ({"repair": "block", "reconstruct": "exact"}, "quantised by prune FOLDER --method magnitude"),
    ({"pattern": "0.5/matrix"}, "give --granularity row or N:M"),
    ({"values": "int3"}, "int3.*known: int8, int4"),
    ({"values": "int4:group=48"}, "multiple of 32"),
    ({"values": "int8:group=128"}, "NAME of: rounding, damping"),
    ({"values": "int8:rounding=nearest", "feed": "both"}, "the sweep of --values"),
])  # fmt: skip
def test_what_does_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune_config(**{"values": "int4", **options})


def test_layers_that_do_not_fit_are_named_before_any_work(tmp_path: Path, text: Path) -> None:
    odd = make_pico_llama(tmp_path / "odd", torch.bfloat16, intermediate_size=80)
    with pytest.raises(ConfigError, match=r"down_proj\.weight has 80 input columns.*--exclude"):
        pruned(odd, tmp_path / "out", text, method="magnitude", values="int4")
    found = pruned(odd, tmp_path / "out", text, method="magnitude", values="int4", exclude="down_proj")
    assert read_values(tmp_path / "out").keys() == found.tensors.keys()
    wide = tf.GPT2Config(**{**GPT2.to_diff_dict(), "n_inner": 72})
    with pytest.raises(ConfigError, match=r"c_proj\.weight has 72 input columns"):
        pruned(make_pico(tmp_path / "g", wide), tmp_path / "no", text, method="magnitude", values="int8")
    double = make_pico_llama(tmp_path / "double", torch.float64)
    with pytest.raises(ConfigError, match="is float64; convert"):
        pruned(double, tmp_path / "no", text, method="magnitude", values="int8", dtype="float32")


def test_experts_are_left_out_by_name(tmp_path: Path, text: Path) -> None:
    model = make_moe(tmp_path / "moe", "mixtral")
    with pytest.raises(ConfigError, match=r"--values does not look inside experts.*--exclude \[\.\]experts\[\.\]"):
        pruned(model, tmp_path / "no", text, method="magnitude", values="int8")
    pruned(model, tmp_path / "out", text, method="magnitude", values="int8", exclude="[.]experts[.]")
    check_values(tmp_path / "out")


@pytest.fixture
def folder(tmp_path: Path, llama: Path, text: Path) -> Path:
    pruned(llama, tmp_path / "values", text, method="wanda", values="int4:group=32")
    return tmp_path / "values"


def test_weights_that_are_not_those_of_the_scales_are_found(folder: Path) -> None:
    key = "model.layers.1.self_attn.v_proj.weight"
    weights = load_file(folder / SINGLE_NAME)
    weights[key][3, :32] *= 1.5
    save_file(weights, folder / SINGLE_NAME, {"format": "pt"})
    save_manifest(folder, load_manifest(folder).model_copy(update={"files": hash_folder(folder)}))
    with pytest.raises(VerifyError, match=f"{key}: a weight is not on the grid.*is of other weights"):
        check_values(folder)
    assert command(["verify", str(folder)]) == 1


def test_heal_refuses_it_and_says_what_works(folder: Path, llama: Path, text: Path, capsys: Any) -> None:
    options = ["--dense", str(llama), "--text", str(text), "--steps", "1", "--out", str(folder.with_name("healed"))]
    assert command(["heal", str(folder), *options]) == 2
    assert "heal the folder before" in capsys.readouterr().err
    asked = ["--values", "int4", "--heal", "1", "--calib", str(text), "--out", str(folder.with_name("no"))]
    assert command(["prune-and-export", str(llama), *asked]) == 2
    assert "heal first, and quantise by prune FOLDER" in capsys.readouterr().err


def test_values_behind_healing_keep_the_mask(tmp_path: Path, llama: Path, text: Path) -> None:
    pruned(llama, tmp_path / "first", text, method="wanda", pattern="16:32")
    pruned(tmp_path / "first", tmp_path / "second", text, method="magnitude", pattern="16:32", values="int4:group=32")
    before, after = (load_file(tmp_path / name / SINGLE_NAME) for name in ("first", "second"))
    assert all(not after[key][before[key] == 0].any() for key in load_manifest(tmp_path / "second").tensors)


def test_no_command_carries_scales_of_other_weights(folder: Path, text: Path) -> None:
    for name, more in {
        "prune": ["--method", "wanda", "--sparsity", "1:4"],
        "tyr": QUICK_TYR,
    }.items():  # fmt: skip
        out = folder.with_name(name)
        calib = ["--calib", str(text), "--calib-samples", "4", "--calib-length", "32"]
        assert command([name, str(folder), *more, *calib, "--out", str(out)]) == 0
        assert not (out / VALUES_NAME).exists()


def test_formats_take_the_weights_as_they_are(folder: Path, capsys: Any) -> None:
    dense = folder.with_name("dense")
    assert command(["export", str(folder), "--format", "dense", "--out", str(dense)]) == 0
    assert command(["verify", str(dense)]) == 0
    assert (dense / VALUES_NAME).read_bytes() == (folder / VALUES_NAME).read_bytes()
    int8 = folder.with_name("int8")
    assert command(["export", str(folder), "--format", "int8", "--out", str(int8)]) == 0
    assert not (int8 / VALUES_NAME).exists()
    model = tf.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    state, stored = model.state_dict(), load_file(folder / SINGLE_NAME)
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    capsys.readouterr()
    assert command(["inspect", str(dense), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["tensors"]}
    assert {row["values"] for name, row in rows.items() if "_proj" in name} == {"int4:group=32"}
    assert "values" not in rows["model.norm.weight"]
    with safe_open(str(dense / VALUES_NAME), "pt") as file:
        assert file.metadata() == {"format": "pt", "bits": "4", "group": "32"}
