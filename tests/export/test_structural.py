"""Structurally pruned checkpoints compute what the masked model computes, wherever they are loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export
from crepe_deploy.exporting.structural import assemble as assembling
from crepe_deploy.exporting.structural.assemble import assemble
from safetensors.torch import load_file
from transformers import AutoModel, OPTConfig

from crepe_deploy.cli import cli
from crepe_deploy.errors import ConfigError, NumericalError, OutputError, ParityError, UnsupportedModel, VerifyError
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.packed.linear import PackedLinear
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.quality.perplexity import evaluate
from crepe_deploy.store.checkpoint import read_config
from crepe_deploy.store.manifest import verify
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.structural.check import check_shapes
from crepe_deploy.structural.plan import Geometry
from crepe_deploy.texts import calibration_windows, load_tokenizer
from tests.export.sliced import EVEN, TOKENS, assembled, load, logits, plain, plans_for, same
from tests.pico import VOCAB, make_pico, sample_text
from tests.structural.random_plans import CONFIGS, UNEVEN, Kept, make_model, masked_model_logits

BIASED = {"attention_bias": True, "mlp_bias": True}
FACTORS = [1.0, 1.1, 1.3, 1.5]
LONG = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": FACTORS, "long_factor": [2.0, 2.5, 3.0, 4.0],
    },
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "kept", "written", "overrides"),
    [
        *((family, EVEN, "llama" if family == "qwen2" else family, {}) for family in CONFIGS),
        ("llama", EVEN, "llama", BIASED),
        ("llama", ((3, 2, 40),) * 3, "mistral", {}),  # 6 heads do not divide 64, which Llama asks for
        ("qwen2", ((4, 2, 40),) * 3, "qwen2", {}),
        ("qwen3", ((3, 1, 40),) * 3, "qwen3", {"attention_bias": True}),
        ("llama", EVEN, "llama", {"tie_word_embeddings": True}),
        ("gemma2", EVEN, "gemma2", {"tie_word_embeddings": True, "attention_bias": True}),
        ("phi3", ((3, 1, 40),) * 3, "phi3", {}),  # 64 / 3 is not the head size, which the configuration then states
        ("phi3", ((4, 2, 40),) * 3, "phi3", LONG),
    ],
)
def test_uniform_widths_are_an_ordinary_model(
    tmp_path: Path, family: str, kept: tuple[Kept, ...], written: str, overrides: dict[str, Any]
) -> None:
    out, expected = assembled(tmp_path, family, kept, "uniform", overrides=overrides)
    model = load(out)
    assert model.config.model_type == written and type(model).__module__.startswith("transformers.")
    groups, queries, neurons = kept[0]
    assert model.config.num_attention_heads == groups * queries and model.config.intermediate_size == neurons
    same(logits(model), expected)
    assert float(expected.abs().max()) > 0.5


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("biased", [False, True])
def test_widths_per_layer(tmp_path: Path, family: str, biased: bool) -> None:
    overrides = (BIASED if family == "llama" else {"attention_bias": True}) if biased else {}
    if family == "mistral" and biased:
        overrides = {"sliding_window": 8}
    out, expected = assembled(tmp_path, family, UNEVEN, "per-layer", overrides=overrides)
    model = load(out)
    assert model.config.model_type == f"crepe_{family}"
    same(logits(model), expected)
    columns = [layer.self_attn.o_proj.weight.shape[1] for layer in model.model.layers]
    assert columns == [groups * queries * 8 for groups, queries, _ in UNEVEN]
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"sdpa"}
    assert [layer.mlp.down_proj.weight.shape[1] for layer in model.model.layers] == [96, 32, 50]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen3", {}),
        ("gemma2", {"attn_logit_softcapping": None}),  # which SDPA in transformers leaves out, and eager does not
        ("gemma3_text", {}),
        ("phi3", {"sliding_window": 8}),
        ("phi3", LONG),
    ],
)
def test_a_model_with_widths_per_layer_saves_reloads_and_generates(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    out, expected = assembled(tmp_path, family, UNEVEN, "per-layer", overrides=overrides)
    model = load(out)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", attn_implementation="eager")
    assert read_config(tmp_path / "again")["per_layer_config"] == {
        "1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32},
        "2": {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 50},
    }
    same(logits(again), expected)
    model.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}
    same(logits(copy.deepcopy(model)), expected)
    options = {"max_new_tokens": 12, "do_sample": False, "min_new_tokens": 12}
    cached = model.generate(TOKENS, use_cache=True, **options)
    assert torch.equal(cached, again.generate(TOKENS, use_cache=False, **options))
    base, cap = AutoModel.from_pretrained(out, dtype=torch.float32), getattr(model.config, "final_logit_softcapping", 0)
    with torch.inference_mode():
        outputs = model.lm_head(base(TOKENS).last_hidden_state)
        same(cap * torch.tanh(outputs / cap) if cap else outputs, expected)


def test_equal_widths_per_layer_are_allowed(tmp_path: Path) -> None:
    out, expected = assembled(tmp_path, "llama", ((4, 2, 96),) * 3, "per-layer")
    assert read_config(out)["per_layer_config"] == {}
    same(logits(load(out)), expected)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3_text", "phi3"])
def test_unmodified_transformers_loads_uniform_widths(tmp_path: Path, family: str) -> None:
    out, expected = assembled(tmp_path, family, EVEN, "uniform")
    done, target = plain(out)
    assert done.returncode == 0, done.stderr[-2000:]
    same(torch.load(target), expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_unmodified_transformers_refuses_widths_per_layer_unless_code_lies_beside_them(
    tmp_path: Path, family: str
) -> None:
    out, expected = assembled(tmp_path, family, UNEVEN, "per-layer", remote_code=True)
    done, target = plain(out, trust_remote_code=True)
    assert done.returncode == 0, done.stderr[-2000:]
    same(torch.load(target), expected)
    same(logits(load(out)), expected)  # with crepe-deploy its own classes are used, and nothing need be trusted
    for path in out.glob("*.py"):
        path.unlink()
    config = read_config(out)
    del config["auto_map"]
    (out / "config.json").write_text(json.dumps(config))
    done, _ = plain(out)
    assert done.returncode != 0 and f"crepe_{family}" in done.stderr


def test_code_lies_beside_the_weights_only_when_asked_for(tmp_path: Path) -> None:
    out, _ = assembled(tmp_path, "llama", UNEVEN, "per-layer")
    assert not list(out.glob("*.py")) and "auto_map" not in read_config(out)


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_it_can_be_pruned_to_a_pattern_and_packed(tmp_path: Path, widths: str) -> None:
    kept = EVEN if widths == "uniform" else ((4, 2, 96), (2, 2, 32), (1, 1, 64))
    out, _ = assembled(tmp_path, "llama", kept, widths)
    config = prune_config("magnitude", "2:4")
    report = prune_and_export(resolve_model(str(out)), tmp_path / "nm", config, None, formats=("dense", "packed"))
    assert report["pruned_tensors"] == 21
    dense, packed = load(tmp_path / "nm" / "dense"), load(tmp_path / "nm" / "packed")
    same(logits(packed), logits(dense))
    layers = sum(isinstance(module, PackedLinear) for module in packed.modules())
    assert layers == (21 if widths == "uniform" else 20)  # one o_proj of 8 input columns stays dense


def test_every_step_of_pruning_works_on_layers_of_different_widths(tmp_path: Path) -> None:
    kept = ((4, 2, 96), (2, 2, 32), (1, 1, 64))
    out, _ = assembled(tmp_path, "llama", kept, "per-layer")
    text = tmp_path / "text.txt"
    text.write_text(sample_text(3000))
    calibration = calibration_windows(text, load_tokenizer(out), 4, 32)
    config = prune_config("wanda", "4:8", permute="fold", reconstruct="exact", feed="both")
    manifest = prune(resolve_model(str(out)), tmp_path / "nm", config, calibration)
    assert manifest.metrics["sparsity_of_pruned_tensors"] == 0.5
    report = evaluate(tmp_path / "nm", text, window=32, max_tokens=256, against=out)
    assert report.paired is not None and 0 < report.paired.kl_mean.value < 5


def test_manifest_card_verify_and_inspect(tmp_path: Path) -> None:
    out, _ = assembled(tmp_path, "mistral", UNEVEN, "per-layer", record={"method": "tyr", "seed": 3})
    manifest = verify(out)
    kept = sum(plan.parameters(Geometry.from_config(Decoder(tmp_path / "model").config)) for plan in
               plans_for(tmp_path / "model", UNEVEN))  # fmt: skip
    assert manifest.metrics["parameters"]["prunable_kept"] == kept
    assert manifest.config["seed"] == 3 and manifest.config["structural"]["layers"][1] == [2, 1, 32]
    stored = sum(tensor.numel() for name, tensor in load_file(out / "model.safetensors").items() if "_proj" in name)
    assert stored == kept
    card = (out / "README.md").read_text()
    assert "structurally pruned" in card and "2 to 8 of 8; 1 to 4 of 4; 32 to 96 of 96" in card
    runner = CliRunner()
    assert runner.invoke(cli, ["verify", str(out)]).exit_code == 0
    shown = json.loads(runner.invoke(cli, ["inspect", str(out), "--json"]).stdout)
    assert shown["layers"][2] == {"layer": 2, "heads": 3, "kv_heads": 3, "intermediate": 50}
    assert "layer 1: 2 query heads, 1 KV heads, 32 neurons" in runner.invoke(cli, ["inspect", str(out)]).stdout
    export_checkpoint(out, tmp_path / "copy", "dense")
    assert verify(tmp_path / "copy").metrics["size"] == manifest.metrics["size"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda config: config["per_layer_config"]["1"].update(intermediate_size=40), "layers.1.mlp.gate_proj"),
        (lambda config: config["per_layer_config"].pop("2"), "layers.2.self_attn.q_proj"),
        (lambda config: config.update(num_hidden_layers=2, per_layer_config={
            "1": config["per_layer_config"]["1"]}), "belongs to layer 2"),
        (lambda config: config.update(num_hidden_layers=4), "layers.3.self_attn.q_proj.weight' is missing"),
    ],
)  # fmt: skip
def test_shapes_that_config_json_does_not_promise_are_named(tmp_path: Path, change: Any, part: str) -> None:
    out, _ = assembled(tmp_path, "llama", UNEVEN, "per-layer")
    check_shapes(out)
    config = read_config(out)
    change(config)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match=part):
        check_shapes(out)


@pytest.mark.parametrize(
    ("options", "kept", "error", "part"),
    [
        ({"widths": "uniform"}, UNEVEN, ConfigError, "layer 1 keeps 2 query heads, 1 KV heads, 32 neurons"),
        ({"widths": "uniform", "layout": "deci"}, EVEN, ConfigError, "uniform widths are a plain checkpoint"),
        ({"widths": "uniform", "remote_code": True}, EVEN, ConfigError, "uniform widths are a plain checkpoint"),
        ({"widths": "other"}, EVEN, ConfigError, "known: uniform, per-layer"),
        ({"layout": "gguf"}, EVEN, ConfigError, "known: plugin, deci"),
        ({"layout": "deci", "remote_code": True}, UNEVEN, ConfigError, "--remote-code adds"),
        ({}, UNEVEN[:2], ConfigError, "2 layers are planned, and the model has 3"),
    ],
)
def test_options_and_plans_that_do_not_fit_are_refused(
    tmp_path: Path, options: dict[str, Any], kept: tuple[Kept, ...], error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=part):
        assembled(tmp_path, "llama", kept, **{"widths": "per-layer", **options})
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("family", "kept", "overrides", "part"),
    [
        ("gemma2", 3, {}, "transformers wants of gemma2 a head count that divides hidden size 64, and 3 does not"),
        ("gemma3_text", 3, {}, "transformers wants of gemma3_text a head count that divides"),
        ("phi3", 3, LONG, "with 4 rotary factors transformers wants of phi3 a head size of hidden size / heads"),
    ],
)
def test_uniform_widths_that_no_stock_class_holds_are_refused_with_the_way_out(
    tmp_path: Path, family: str, kept: int, overrides: dict[str, Any], part: str
) -> None:
    with pytest.raises(ConfigError, match=f"{part}.*use --widths per-layer"):
        assembled(tmp_path, family, ((kept, 1, 40),) * 3, "uniform", overrides=overrides)
    assert not (tmp_path / "out").exists()


def test_a_phi3_that_does_not_state_the_size_of_its_heads(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "phi3")
    config = read_config(model)
    del config["head_dim"]
    (model / "config.json").write_text(json.dumps(config))
    plans = plans_for(model, EVEN)
    expected = masked_model_logits(model, plans, TOKENS)
    for widths in ("uniform", "per-layer"):
        assemble(resolve_model(str(model)), plans, tmp_path / widths, widths=widths)
        assert read_config(tmp_path / widths)["head_dim"] == 8
        same(logits(load(tmp_path / widths)), expected)


def test_other_families_other_models_plans_and_used_folders_are_refused(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=8,
        max_position_embeddings=512, word_embed_proj_dim=64,
    )  # fmt: skip
    other = make_pico(tmp_path / "opt", config)
    llama = make_model(tmp_path / "llama", "llama")
    with pytest.raises(UnsupportedModel, match="'opt': structural pruning knows llama, mistral, qwen2, qwen3, gemma2"):
        assemble(resolve_model(str(other)), plans_for(llama, EVEN), tmp_path / "out")
    model = make_model(tmp_path / "model", "llama", num_key_value_heads=2)
    with pytest.raises(ConfigError, match="layer 0: KV group"):
        assemble(resolve_model(str(model)), plans_for(llama, UNEVEN), tmp_path / "out")
    with pytest.raises(OutputError):
        assemble(resolve_model(str(model)), plans_for(model, EVEN), model)


def test_a_refit_that_overflows_the_files_dtype_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", torch.float16)
    plans = plans_for(model, EVEN)
    plans[1].down_proj[0, 0] = 1e6
    with pytest.raises(NumericalError, match=r"mlp\.down_proj\.weight: the refit weight does not fit float16"):
        assemble(resolve_model(str(model)), plans, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrongly_sliced_model_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = assembling.sliced

    def wrong(path: str, *rest: Any) -> torch.Tensor:
        tensor = right(path, *rest)
        return tensor.flip(0) if path == "mlp.up_proj.weight" else tensor

    monkeypatch.setattr(assembling, "sliced", wrong)
    with pytest.raises(ParityError):
        assembled(tmp_path, "llama", UNEVEN, "per-layer")
    assert not (tmp_path / "out").exists()
