"""Flavour by family by rotary embedding: exported with its proof, or refused by name before anything is built."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from crepe_deploy.exporting.formats import onnx as onnx_export
from crepe_deploy.exporting.onnx.support import GENAI_ROPE_TYPES, ROPE_TYPES, check_end, check_model
from crepe_deploy.exporting.pipeline import export_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from crepe_deploy.errors import UnsupportedModel
from tests.onnx_models import CONFIGS, LLAMA3_ROPE, pruned_from

ROOT = Path(__file__).parents[2]
_BASE: dict[str, Any] = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_type": "yarn", **_BASE},
    "longrope": {"rope_type": "longrope", **_BASE, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16},
    "llama3": LLAMA3_ROPE,
    "proportional": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}
GENAI = {
    ("llama", "default"), ("llama", "llama3"), ("mistral without a window", "default"),
    ("mistral without a window", "linear"), ("qwen2", "default"), ("qwen2", "linear"), ("qwen3", "default"),
    ("qwen3", "linear"),
}  # fmt: skip
PORTABLE = ("default", "linear", "yarn", "llama3")
# Which of those that work are built in the quick tests; the others of a flavour go the same way through it.
BUILT = {("llama", "linear", "portable"), ("qwen2", "yarn", "portable"), ("qwen2", "linear", "genai")}


def config_of(family: str, rope: str) -> Any:
    config = copy.deepcopy(CONFIGS[family])
    kinds = dict(ROPES[rope])
    layered = family == "gemma3_text"  # a kind of layer, a rotary embedding
    default = {"rope_type": "default", "rope_theta": 10000.0}
    config.rope_parameters = {"full_attention": kinds, "sliding_attention": default} if layered else kinds
    return config


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("flavor", ["portable", "genai"])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_rotary_embedding_is_refused_by_name_or_supported(family: str, flavor: str, rope: str) -> None:
    config = config_of(family, rope)
    if rope in PORTABLE if flavor == "portable" else (family, rope) in GENAI:
        check_model(config, flavor)
    else:
        with pytest.raises(UnsupportedModel, match=rf"'{rope}'|gemma3_text|sliding window"):
            check_model(config, flavor)


@pytest.mark.parametrize(("family", "rope", "flavor"), sorted(BUILT))
def test_what_is_supported_is_proven(family: str, rope: str, flavor: str, tmp_path: Path) -> None:
    source = pruned_from(tmp_path, config_of(family, rope))
    manifest = export_checkpoint(source, tmp_path / "onnx", "onnx", options={"flavor": flavor, "precision": "fp32"})
    assert manifest.metrics["onnx"]["parity"]["max_abs_logit_difference"] < 1e-4


def test_what_is_not_is_refused_before_anything_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "build_genai", None)
    source = pruned_from(tmp_path, config_of("llama", "linear"))
    with pytest.raises(UnsupportedModel, match=r"genai cannot export this 'llama' with .* 'linear'.*use portable"):
        export_checkpoint(source, tmp_path / "onnx", "onnx", options={"flavor": "genai", "precision": "fp32"})
    assert not (tmp_path / "onnx").exists()


def test_every_kind_that_transformers_knows_is_in_the_table() -> None:
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


def test_the_documentation_names_what_is_supported() -> None:
    text = " ".join((ROOT / "docs" / "onnx.md").read_text().split())
    every = ", ".join(f"`{kind}`" for kind in ROPE_TYPES)
    assert f"Rotary embeddings: {every} in `portable`" in text
    llama, others = (" and ".join(f"`{kind}`" for kind in GENAI_ROPE_TYPES[key]) for key in ("llama", ""))
    assert f"in `genai` {llama} for Llama, {others} for the others" in text


@pytest.mark.parametrize("flavor", ["portable", "genai"])
@pytest.mark.parametrize("context", [12, 32])
def test_a_context_shorter_than_the_prompts_of_the_proof(context: int, flavor: str, tmp_path: Path) -> None:
    config = config_of("qwen2", "default")
    config.max_position_embeddings = context
    source = pruned_from(tmp_path, config)
    manifest = export_checkpoint(source, tmp_path / "onnx", "onnx", options={"flavor": flavor, "precision": "fp32"})
    assert manifest.metrics["onnx"]["parity"]["greedy_tokens"] >= context // 2


@pytest.mark.parametrize("end", [None, 320, [1, 400]], ids=str)
def test_genai_needs_an_end_of_text_that_the_vocabulary_holds(end: Any, tmp_path: Path) -> None:
    source = pruned_from(tmp_path, config_of("qwen3", "default"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    config = config_of("qwen3", "default")
    config.eos_token_id = end
    check_end(source, config, "portable")
    with pytest.raises(UnsupportedModel, match=r"genai cannot export .*end-of-text token is (not known|320|400)"):
        check_end(source, config, "genai")
    config.eos_token_id = [1, 7]
    check_end(source, config, "genai")
