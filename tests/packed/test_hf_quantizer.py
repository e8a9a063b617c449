"""transformers loads, runs and saves packed checkpoints with us, and refuses them without us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from crepe_deploy.exporting.pipeline import export_checkpoint
from safetensors.torch import load_file, save_file

from crepe_deploy.errors import CheckpointError, ConfigError
from crepe_deploy.packed import hf_quantizer as hf
from crepe_deploy.packed.linear import PackedLinear
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.sources import resolve_model
from tests.pico import VOCAB, make_pico, make_pico_llama

TOKENS = torch.arange(2, 30)[None]


def folders(tmp_path: Path, pattern: str = "2:4", model: Path | None = None, **options: Any) -> tuple[Path, Path]:
    """A dense-with-zeros checkpoint and its packed twin."""
    source = model or make_pico_llama(tmp_path / "model", **options)
    prune(resolve_model(str(source)), tmp_path / "dense", prune_config("magnitude", pattern), None)
    export_checkpoint(tmp_path / "dense", tmp_path / "packed", "packed")
    return tmp_path / "dense", tmp_path / "packed"


def load(folder: Path, **options: Any) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(TOKENS).logits.float()
    return result


@pytest.mark.parametrize(
    ("pattern", "dtype"), [("2:4", torch.float32), ("16:32", torch.bfloat16), ("0.6", torch.float32)]
)
def test_packed_computes_what_dense_computes_and_saves_back(tmp_path: Path, pattern: str, dtype: torch.dtype) -> None:
    dense, packed = folders(tmp_path, pattern, dtype=dtype)
    expected, model = load(dense), load(packed)
    assert model.dtype == dtype
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 14 and all(layer.prepared for layer in layers)
    tolerance = 1e-4 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=tolerance)
    if dtype == torch.float32:
        options = {"max_new_tokens": 24, "do_sample": False}
        assert torch.equal(model.generate(TOKENS, **options), expected.generate(TOKENS, **options))

    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(before[name].shape == after[name].shape and before[name].equal(after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (packed, tmp_path / "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_no_dense_weight_is_held(tmp_path: Path) -> None:
    _, packed = folders(tmp_path, "16:32", dtype=torch.bfloat16, hidden_size=256, intermediate_size=512)
    model = load(packed)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    held = sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()) if t is not None)
    assert held < 0.6 * 512 * 256 * 2
    assert f"{name}.weight" not in dict(model.named_parameters())


def test_names_without_a_prefix_and_tied_embeddings(tmp_path: Path) -> None:
    config = tf.OPTConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
                          word_embed_proj_dim=32, max_position_embeddings=128, pad_token_id=1, bos_token_id=0,
                          eos_token_id=1)  # fmt: skip
    dense, packed = folders(tmp_path, model=make_pico(tmp_path / "opt", config))
    torch.testing.assert_close(logits(load(packed)), logits(load(dense)), rtol=0, atol=1e-4)


def test_the_bare_decoder_loads_too(tmp_path: Path) -> None:
    dense, packed = folders(tmp_path)
    with torch.inference_mode():
        found, expected = (tf.AutoModel.from_pretrained(folder)(TOKENS).last_hidden_state for folder in (packed, dense))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_loaded_model_takes_another_dtype(tmp_path: Path) -> None:
    dense, packed = folders(tmp_path, dtype=torch.bfloat16)
    model = load(packed, dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(load(dense, dtype=torch.float32)), rtol=0, atol=1e-4)


def test_automatic_placement_is_the_cpu_where_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packed = folders(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="auto: packed layers run on the CPU"):
        load(packed, device_map="auto")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    quantizer = load(packed, device_map="cpu").hf_quantizer
    assert quantizer.update_device_map("auto") == {"": "cpu"} and quantizer.update_device_map(None) is None


def test_damage_is_refused_by_name(tmp_path: Path) -> None:
    _, packed = folders(tmp_path)
    name, file = "model.layers.1.mlp.up_proj.weight", packed / "model.safetensors"
    whole = load_file(file)
    for part in ("_values", "_mask"):
        save_file({key: value for key, value in whole.items() if key != name + part}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"up_proj.weight{part}' is missing"):
            load(packed)
    wrong = {**whole, name + "_mask": whole[name + "_mask"].clone()}
    wrong[name + "_mask"][0, 0] ^= 1
    save_file(wrong, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_mask: row 0"):
        load(packed)


def test_newer_versions_and_other_devices_are_refused(tmp_path: Path) -> None:
    _, packed = folders(tmp_path)
    with pytest.raises(ConfigError, match="packed layers run on the CPU"):
        load(packed, device_map={"": "cuda:0"})
    path = packed / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["version"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="version 4 is newer"):
        load(packed)


LOAD = "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({!r}); print('loaded')"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_transformers_without_us_fails_loudly(tmp_path: Path) -> None:
    _, packed = folders(tmp_path)
    load(packed).save_pretrained(tmp_path / "saved")
    for folder in (packed, tmp_path / "saved"):
        stock = run_python(LOAD.format(str(folder)))
        assert stock.returncode != 0 and "mismatch" in stock.stderr.lower() and "loaded" not in stock.stdout


@pytest.mark.parametrize("order", ["import crepe_deploy; ", "import transformers.quantizers.auto, crepe_deploy; "])
def test_importing_crepe_deploy_is_enough(tmp_path: Path, order: str) -> None:
    _, packed = folders(tmp_path)
    done = run_python(order + LOAD.format(str(packed)))
    assert done.returncode == 0 and "loaded" in done.stdout, done.stderr


def test_importing_crepe_deploy_imports_nothing_heavy() -> None:
    done = run_python("import sys, crepe_deploy; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "place, runs", [("cpu", True), ("cuda", True), ("cuda:0", True), ("0", True), ("cuda:1", False), ("disk", False)]
)
def test_places_of_a_machine_with_one_gpu(monkeypatch: pytest.MonkeyPatch, place: str, runs: bool) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert hf._runs_on(place) == runs
