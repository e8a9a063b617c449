"""The whole pipeline on tiny random models of every family: patterns, kept values, logits, records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from crepe_deploy.errors import ConfigError, OutputError, PatternError, UnsupportedModel
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.families import FAMILIES, covered
from crepe_deploy.model.proof import walk_logits
from crepe_deploy.pattern import Pattern, parse_pattern, zero_count
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.manifest import Manifest, verify
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.structural import hf_auto
from crepe_deploy.texts import CalibrationSet, calibration_windows, load_tokenizer
from tests.pico import VOCAB, make_pico, make_pico_llama, sample_text

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_HEADS = {**_COMMON, "head_dim": 16}
_SMALL = {key: _COMMON[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
_NO_GROUPS = {key: value for key, value in _COMMON.items() if key not in ("num_key_value_heads", "intermediate_size")}
_GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, tf.PretrainedConfig] = {
    "llama": tf.LlamaConfig(**_COMMON),
    "mistral": tf.MistralConfig(**_HEADS, sliding_window=8),
    "qwen2": tf.Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen3": tf.Qwen3Config(**_HEADS),
    "gemma": tf.GemmaConfig(**_HEADS),
    "gemma2": tf.Gemma2Config(**_HEADS, sliding_window=8),
    "gemma3_text": tf.Gemma3TextConfig(**_HEADS, sliding_window=8, layer_types=_GEMMA_LAYERS),
    "phi3": tf.Phi3Config(**_COMMON),
    "opt": tf.OPTConfig(**_NO_GROUPS, ffn_dim=128, word_embed_proj_dim=32),
    "gpt_neox": tf.GPTNeoXConfig(**_NO_GROUPS, intermediate_size=128),
    "gpt2": tf.GPT2Config(**_SMALL, n_embd=64, n_layer=3, n_head=4, n_positions=128),
}  # fmt: skip
# Models of these families whose blocks add up otherwise, or whose layers have widths of their own.
VARIANTS: dict[str, tf.PretrainedConfig] = {
    "opt, norms after": tf.OPTConfig(**{**CONFIGS["opt"].to_dict(), "do_layer_norm_before": False}),
    "gpt_neox, one after the other": tf.GPTNeoXConfig(
        **{**CONFIGS["gpt_neox"].to_dict(), "use_parallel_residual": False}
    ),
    "crepe_llama": hf_auto.load()["crepe_llama"](
        **_HEADS, per_layer_config={"1": {"num_attention_heads": 2, "intermediate_size": 96}}
    ),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(sample_text(3000), encoding="utf-8")
    return path


def windows(model: Path, text: Path, samples: int = 6, length: int = 32) -> CalibrationSet:
    return calibration_windows(text, load_tokenizer(model), samples, length, seed=0)


def run(
    model: Path, out: Path, text: Path, method: str = "crepe", pattern: str | Pattern = "2:4", **config: Any
) -> Manifest:
    parsed = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    return prune(resolve_model(str(model)), out, prune_config(method, parsed, **config), windows(model, text))


def logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tf.AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits.float()


def test_every_supported_family_is_tested() -> None:
    assert CONFIGS.keys() == {name for name in covered() if not FAMILIES[name].per_layer_of}


@pytest.mark.parametrize("family", CONFIGS)
def test_walk_computes_what_transformers_computes(tmp_path: Path, family: str) -> None:
    model = make_pico(tmp_path / "m", CONFIGS[family])
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(walk_logits(Decoder(model), tokens), logits(model, tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("feed", ["dense", "pruned"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_prunes_and_reloads(tmp_path: Path, text: Path, family: str, feed: str) -> None:
    model = make_pico(tmp_path / "m", CONFIGS[family])
    manifest = run(model, tmp_path / "out", text, feed=feed)
    before, after = CheckpointReader(model), CheckpointReader(tmp_path / "out")
    assert before.tensors.keys() == after.tensors.keys()
    assert len(manifest.tensors) == sum(len(block) for block in Decoder(model).linears)
    for name in before.tensors:
        old, new = before.load(name), after.load(name)
        kept = new != 0
        assert torch.equal(new[kept], old[kept])
        if name not in manifest.tensors:
            assert torch.equal(old, new)
            continue
        weight = new.T if manifest.tensors[name].transposed else new
        assert (weight.reshape(weight.shape[0], -1, 4) != 0).sum(-1).eq(2).all()
    tokens = torch.randint(VOCAB, (1, 24))
    torch.testing.assert_close(
        walk_logits(Decoder(tmp_path / "out"), tokens), logits(tmp_path / "out", tokens), atol=1e-5, rtol=1e-5
    )
    assert manifest.metrics["parity"]["max_abs_logit_difference"] == 0
    verify(tmp_path / "out")


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "16:32", "3:16", "0.5", "0.7"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "crepe", "sparsegpt"])
def test_every_method_reaches_every_pattern_exactly(tmp_path: Path, text: Path, method: str, pattern: str) -> None:
    model = make_pico_llama(tmp_path / "m", torch.bfloat16, num_hidden_layers=1)
    manifest = run(model, tmp_path / "out", text, method, pattern)
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        if name in manifest.tensors:
            assert int((weight == 0).sum()) == zero_count(parse_pattern(pattern), *weight.shape)
            assert manifest.tensors[name].zeros == int((weight == 0).sum())


def test_statistics_are_those_of_the_real_inputs(tmp_path: Path, text: Path) -> None:
    """Wanda's mask from hooks on stock transformers equals the pipeline's, dense feed."""
    model = make_pico_llama(tmp_path / "m")
    run(model, tmp_path / "out", text, "wanda")
    stock = tf.AutoModelForCausalLM.from_pretrained(model).eval()
    squares: dict[str, torch.Tensor] = {}
    for name, module in stock.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: squares.update({name: squares.get(name, 0) + args[0].square().sum((0, 1))})
            )
    with torch.inference_mode():
        stock(windows(model, text).tokens)
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    for name in (name for name in squares if "layers" in name):
        score = stock.get_submodule(name).weight.detach().abs() * squares[name].sqrt()
        groups = score.view(score.shape[0], -1, 4)
        expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2).indices, True)
        assert torch.equal((pruned[f"{name}.weight"] != 0).view_as(expected), expected)


def test_feeds_differ_only_after_the_first_block(tmp_path: Path, text: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    for feed in ("dense", "pruned"):
        run(model, tmp_path / feed, text, "wanda", feed=feed)
    dense, pruned = (load_file(tmp_path / feed / "model.safetensors") for feed in ("dense", "pruned"))
    differing = {name.split(".")[2] for name in dense if not torch.equal(dense[name], pruned[name])}
    assert differing == {"1"}


@pytest.mark.parametrize("shard_size", ["20KB", "60KB"])
def test_sharded_models_keep_their_shards(tmp_path: Path, text: Path, shard_size: str) -> None:
    single = make_pico_llama(tmp_path / "single")
    sharded = tmp_path / "sharded"
    tf.AutoModelForCausalLM.from_pretrained(single).save_pretrained(sharded, max_shard_size=shard_size)
    load_tokenizer(single).save_pretrained(sharded)
    run(single, tmp_path / "a", text)
    run(sharded, tmp_path / "b", text)
    assert {path.name for path in (tmp_path / "b").glob("*.safetensors")} == {
        p.name for p in sharded.glob("*.safetensors")
    }
    one, many = CheckpointReader(tmp_path / "a"), CheckpointReader(tmp_path / "b")
    assert all(torch.equal(one.load(name), many.load(name)) for name in one.tensors)


def test_compute_dtype_leaves_the_file_dtype_and_the_kept_bits_alone(tmp_path: Path, text: Path) -> None:
    model = make_pico_llama(tmp_path / "m", torch.bfloat16)
    run(model, tmp_path / "out", text, dtype="float32")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor[tensor != 0], before[name][tensor != 0])


def test_include_and_exclude(tmp_path: Path, text: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    manifest = run(model, tmp_path / "out", text, include="mlp", exclude=r"layers\.0|down_proj")
    assert set(manifest.tensors) == {"model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"}


def test_the_manifest_tells_what_was_done(tmp_path: Path, text: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    manifest = run(model, tmp_path / "out", text, params={"exponent": 0.5, "gamma": 0.25})
    on_disk = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert on_disk == manifest.model_dump(mode="json")
    assert on_disk["config"]["resolved_method"]["gamma"] == 0.25
    assert on_disk["calibration"]["token_count"] == 6 * 32
    assert len(on_disk["calibration"]["sha256"]) == 64
    assert on_disk["source"]["files"].keys() == {"config.json", "model.safetensors"}
    assert "lm_head.weight" in on_disk["dense_tensors"]
    assert 0 < on_disk["metrics"]["mean_layer_error"] < 1


def test_same_seed_same_bytes(tmp_path: Path, text: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    hashes = [run(model, tmp_path / name, text).files["model.safetensors"] for name in ("a", "b")]
    assert hashes[0] == hashes[1]


def test_no_stale_claims_are_copied(tmp_path: Path, text: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "sparsity_config": {"x": 1}}))
    (model / "modeling_custom.py").write_text("raise SystemExit")
    (model / "LICENSE").write_text("terms")
    run(model, tmp_path / "out", text)
    assert "sparsity_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not (tmp_path / "out" / "modeling_custom.py").exists()
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_refusals_come_before_any_work(tmp_path: Path, text: Path) -> None:
    model = make_pico_llama(tmp_path / "m", intermediate_size=120)
    source = resolve_model(str(model))
    tokens = windows(model, text)

    def attempt(out: Path = tmp_path / "out", calib: CalibrationSet | None = tokens, **config: Any) -> None:
        settings: dict[str, Any] = {"method": "wanda", "pattern": parse_pattern("2:4"), **config}
        prune(source, out, prune_config(**settings), calib)

    with pytest.raises(PatternError, match=r"down_proj.weight: its 120 input columns do not split into groups of 32"):
        attempt(pattern=parse_pattern("16:32"))
    with pytest.raises(ConfigError, match="known: magnitude, wanda"):
        attempt(method="wunda")
    with pytest.raises(ConfigError, match="needs calibration text"):
        attempt(calib=None)
    with pytest.raises(ConfigError, match="leave nothing to prune"):
        attempt(include="nothing")
    with pytest.raises(ConfigError, match="not a regular expression"):
        attempt(include="(")
    with pytest.raises(ConfigError, match="feed 'sideways' is unknown"):
        attempt(feed="sideways")
    with pytest.raises(ConfigError, match="dtype 'int3' is unknown"):
        attempt(dtype="int3")
    with pytest.raises(OutputError, match="--overwrite"):
        (tmp_path / "exists").mkdir()
        attempt(out=tmp_path / "exists")
    with pytest.raises(OutputError, match="one folder"):
        attempt(out=model)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def _folder(root: Path, config: tf.PretrainedConfig) -> Path:
    return make_pico(root, config)


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    config = tf.MixtralConfig(**_COMMON, num_local_experts=2)
    with pytest.raises(UnsupportedModel, match=r"MixtralForCausalLM: .*experts"):
        Decoder(_folder(tmp_path / "m", config))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model_type": "never_heard_of"}, "never_heard_of"),
        ({"model_type": "never_heard_of", "auto_map": {"AutoConfig": "x.Y"}}, "code from the checkpoint"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantised or packed \(gptq\)"),
        ({"model_type": "t5"}, "not a text-only decoder"),
    ],
)  # fmt: skip
def test_unsupported_configurations_are_named(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    model = make_pico_llama(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **edit}))
    with pytest.raises(UnsupportedModel, match=message):
        Decoder(model)
