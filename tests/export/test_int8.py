"""int8 export: rounded to nearest, read by compressed-tensors, transformers and vLLM as meant; misfits refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from crepe_deploy.exporting import int8
from crepe_deploy.exporting.int8 import quantization_config, quantize
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, MixtralConfig

from crepe_deploy.cli import cli
from crepe_deploy.errors import CheckpointError, ConfigError, ParityError, UnsupportedModel, VerifyError
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.store.audit import inspect_folder
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.manifest import load_manifest, sha256_file, verify
from crepe_deploy.store.sources import resolve_model
from tests.pico import VOCAB, make_pico, make_pico_llama

LOGPROBS = Path(__file__).with_name("vllm_logprobs.py")
NAME = "model.layers.0.mlp.down_proj.weight"
needs_ct = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def pruned(folder: Path, formats: tuple[str, ...], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A pico Llama pruned to 2:4 and exported; returns the folder of the formats."""
    model = make_pico_llama(folder / "model", dtype)
    prune_and_export(resolve_model(str(model)), folder / "out", prune_config("magnitude", "2:4"), None, formats=formats)
    return folder / "out"


def by_loops(weight: Tensor, scales: Tensor) -> list[list[int]]:
    """Nearest multiple of its row's scale, ties to even, one number at a time."""
    return [
        [max(-127, min(127, round(float(value) / float(scale)))) for value in row]
        for row, scale in zip(weight, scales, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_against_loops_with_awkward_rows(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 24, generator=generator).to(dtype)
    weight[1] = 0
    weight[2] *= 1e-5
    weight[3, 5:] = 0
    weight[4] = weight[4].sign() * 3
    weight[5, 0] = torch.finfo(dtype).max / 4
    values, scales = quantize(weight)
    assert (values.dtype, scales.dtype, scales.shape) == (torch.int8, dtype, (7, 1))
    assert values.tolist() == by_loops(weight.float(), scales.float())
    error = (weight.float() - values.float() * scales.float()).abs()
    assert bool((error <= scales.float() * 0.500001).all())
    assert not values[weight == 0].any() and values[4].abs().eq(127).all()
    assert values[[0, 3, 5, 6]].abs().amax(dim=1).eq(127).all()


def test_large_matrices_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    whole = quantize(weight)
    monkeypatch.setattr(int8, "ROWS", 3)
    assert all(torch.equal(first, second) for first, second in zip(whole, quantize(weight), strict=True))


def test_an_unpruned_folder_and_what_is_written_about_it(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model", torch.bfloat16)
    manifest = export_checkpoint(model, tmp_path / "int8", "int8")
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "int8"))
    chosen = {name for name in before if "_proj." in name}
    assert len(chosen) == 14 and set(after) == set(before) | {f"{name}_scale" for name in chosen}
    for name, tensor in before.items():
        assert torch.equal(after[name], quantize(tensor)[0] if name in chosen else tensor)
    verify(tmp_path / "int8")
    assert (manifest.format, manifest.stage, manifest.parent, manifest.tensors) == ("int8", "export", None, {})
    rows, columns = before[NAME].shape
    size = manifest.metrics["size"]
    assert size["quantised_tensors"] == 14 and 0.5 < size["weight_bytes_over_dense"] < 0.5 + 1 / 64
    files = [sum(path.stat().st_size for path in CheckpointReader(f).files) for f in (tmp_path / "int8", model)]
    assert size["file_bytes_over_dense"] == files[0] / files[1]
    difference = before[NAME].float() - after[NAME].float() * after[NAME + "_scale"].float()
    relative = float(difference.norm() / before[NAME].float().norm())
    assert manifest.metrics["quantisation"]["relative_error"][NAME] == pytest.approx(relative, rel=1e-4)
    assert 0.001 < relative < 0.02 and rows * columns == 64 * 128
    card = (tmp_path / "int8" / "README.md").read_text()
    assert "# model, quantised to int8" in card and "| pruning | none |" in card
    assert "neither smaller nor faster" in card and "bytes of the quantised layers" in card


def test_a_pruned_source_keeps_its_zeros_and_says_they_buy_nothing(tmp_path: Path) -> None:
    out = pruned(tmp_path, ("dense", "int8"))
    dense, int8_manifest = load_manifest(out / "dense"), verify(out / "int8")
    assert int8_manifest.parent is not None and "greedy" not in int8_manifest.metrics
    weight, values = (load_file(out / name / "model.safetensors")[NAME] for name in ("dense", "int8"))
    assert not values[weight == 0].any()
    record = int8_manifest.tensors[NAME]
    assert record.zeros == int((values == 0).sum()) >= dense.tensors[NAME].zeros == weight.numel() // 2
    assert record.sparsity == record.zeros / values.numel()
    assert int8_manifest.metrics["sparsity_of_pruned_tensors"] >= 0.5
    audits = {audit["name"]: audit for audit in inspect_folder(out / "int8")}
    assert (audits[NAME]["dtype"], audits[NAME]["pattern"]) == ("int8", "2:4")
    card = (out / "int8" / "README.md").read_text()
    assert "pruned to 2:4 with magnitude, quantised to int8" in card
    again = export_checkpoint(out / "dense", tmp_path / "again", "int8")
    assert again.parent == sha256_file(out / "dense" / "manifest.json")
    assert sha256_file(tmp_path / "again" / "model.safetensors") == sha256_file(out / "int8" / "model.safetensors")


def test_other_sources_and_targets_are_refused_with_the_way_out(tmp_path: Path) -> None:
    out = pruned(tmp_path, ("packed", "int8"))
    with pytest.raises(ConfigError, match=r"is packed.*--format dense"):
        export_checkpoint(out / "packed", tmp_path / "x", "int8")
    with pytest.raises(ConfigError, match="already int8"):
        export_checkpoint(out / "int8", tmp_path / "x", "int8")
    for other in ("dense", "packed"):
        with pytest.raises(ConfigError, match="int8"):
            export_checkpoint(out / "int8", tmp_path / "x", other)
    (out / "int8" / "manifest.json").unlink()
    with pytest.raises(UnsupportedModel, match="asks for quantisation"):
        export_checkpoint(out / "int8", tmp_path / "x", "int8")
    (out / "packed" / "manifest.json").unlink()
    with pytest.raises(UnsupportedModel, match="already quantised or packed"):
        export_checkpoint(out / "packed", tmp_path / "x", "int8")
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.partial"))


def test_unsupported_families_are_named_before_any_work(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
    gpt2 = make_pico(tmp_path / "gpt2", GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **sizes))
    with pytest.raises(UnsupportedModel, match=r"'gpt2' stores.*c_attn"):
        export_checkpoint(gpt2, tmp_path / "out", "int8")
    config = prune_config("magnitude", "2:4")
    with pytest.raises(UnsupportedModel, match="'gpt2'"):
        prune_and_export(resolve_model(str(gpt2)), tmp_path / "out", config, None, formats=("int8",))
    experts = MixtralConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                            num_key_value_heads=1, num_local_experts=2, **sizes)  # fmt: skip
    with pytest.raises(UnsupportedModel, match="experts"):
        export_checkpoint(make_pico(tmp_path / "moe", experts), tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_damage_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = pruned(tmp_path, ("dense",))
    file = out / "dense" / "model.safetensors"
    tensors = load_file(file)
    tensors[NAME][0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(VerifyError, match="differs"):
        export_checkpoint(out / "dense", tmp_path / "x", "int8")
    (out / "dense" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"down_proj.*NaN"):
        export_checkpoint(out / "dense", tmp_path / "x", "int8")
    floor = lambda weight: (quantize(weight)[0] - 1, quantize(weight)[1])  # noqa: E731
    monkeypatch.setattr(int8, "quantize", floor)
    with pytest.raises(ParityError, match="rounded to nearest"):
        export_checkpoint(tmp_path / "model", tmp_path / "x", "int8")
    assert not (tmp_path / "x").exists()


def test_the_command_line_exports_a_plain_folder(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model")
    arguments = ["export", str(model), "--format", "int8", "--out", str(tmp_path / "int8"), "--json"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert json.loads(done.stdout)["size"]["quantised_tensors"] == 14


@needs_ct
def test_compressed_tensors_understands_the_config_and_rounds_alike() -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import quantize as theirs

    content = quantization_config(["lm_head"])
    parsed = QuantizationConfig.model_validate(content)
    assert set(content) <= set(QuantizationConfig.model_fields)  # it would ignore an unknown key in silence
    scheme = parsed.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme) and scheme.weights is not None and parsed.ignore == ["lm_head"]
    assert (parsed.format, parsed.quantization_status.value) == ("int-quantized", "compressed")
    assert scheme.input_activations == QuantizationArgs(num_bits=8, strategy="token", dynamic=True, symmetric=True)
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    values, scales = quantize(weight)
    assert torch.equal(theirs(weight, scales, torch.zeros_like(scales), scheme.weights, dtype=torch.int8), values)


def int8_reference(model: Any, activations: bool) -> Any:
    """The dense model computing W8A8 by hand: weights rounded, and activations where asked for."""

    def w8a8(layer: torch.nn.Linear) -> Any:
        values, scales = quantize(layer.weight.data)
        weight = values.float() * scales

        def forward(x: Tensor) -> Tensor:
            scale = x.abs().amax(dim=-1, keepdim=True) / 127.5
            rounded = (x / scale).round().clamp(-128, 127) * scale
            return linear(rounded if activations else x, weight, layer.bias)

        return forward

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            layer.forward = w8a8(layer)
    return model


@needs_ct
def test_transformers_computes_with_rounded_weights_and_rounded_activations(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model")
    export_checkpoint(model, tmp_path / "int8", "int8")
    tokens = torch.arange(2, 50)[None]
    load = AutoModelForCausalLM.from_pretrained
    with torch.inference_mode():
        found = load(tmp_path / "int8")(tokens).logits
        both, weights_only = (int8_reference(load(model), flag)(tokens).logits for flag in (True, False))
        dense = load(model)(tokens).logits
    noise = float((both - dense).norm() / dense.norm())
    assert float((found - both).norm() / dense.norm()) < noise / 20
    assert float((found - weights_only).norm() / dense.norm()) > noise / 4


@needs_ct
def test_other_head_names_stay_dense(tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = make_pico(tmp_path / "model", config)
    manifest = export_checkpoint(model, tmp_path / "int8", "int8")
    assert manifest.metrics["size"]["quantised_tensors"] == 8
    ignore = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["embed_out", "lm_head"]
    tokens = torch.arange(2, 20)[None]
    with torch.inference_mode():
        found, dense = (AutoModelForCausalLM.from_pretrained(f)(tokens).logits for f in (tmp_path / "int8", model))
    assert 0 < float((found - dense).norm() / dense.norm()) < 0.05


@needs_vllm
@pytest.mark.vllm
def test_vllm_computes_what_transformers_does(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model", torch.bfloat16, hidden_size=128, intermediate_size=256)
    export_checkpoint(model, tmp_path / "int8", "int8")
    prompts = [[(7 * start + 3 * index * index) % (VOCAB - 2) + 2 for index in range(40)] for start in range(4)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-P", str(LOGPROBS), str(tmp_path / "int8"), json.dumps(prompts)],
        capture_output=True, text=True, env=environment, timeout=3600, check=False,
    )  # fmt: skip
    assert "LOGPROBS" in done.stdout, done.stderr[-4000:]
    served = torch.tensor(json.loads(done.stdout.split("LOGPROBS", 1)[1].splitlines()[0]))
    tokens = torch.tensor(prompts)[:, :, None]

    def logprobs(folder: Path) -> Tensor:
        with torch.inference_mode():
            logits = AutoModelForCausalLM.from_pretrained(folder)(tokens[..., 0]).logits
        return logits.float().log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:])[..., 0]

    expected, dense = logprobs(tmp_path / "int8"), logprobs(model)
    noise = float((expected - dense).abs().mean())  # two W8A8 engines round other activations differently
    assert 0 < float((served - expected).abs().mean()) < 1.5 * noise < 0.1 * float(dense.std())
    weights = load_file(tmp_path / "int8" / "model.safetensors")
    weights[NAME + "_scale"] = weights[NAME + "_scale"].flip(0).contiguous()
    save_file(weights, tmp_path / "int8" / "model.safetensors", {"format": "pt"})
    assert float((served - logprobs(tmp_path / "int8")).abs().mean()) > 1.5 * noise  # what a wrong reading looks like
