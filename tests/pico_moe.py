"""Tiny random models with experts, in files as their users have them: the hub's tensor names and config fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.pico import VOCAB, make_pico

_COMMON: Final = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "tie_word_embeddings": False, "num_experts_per_tok": 2,
}  # fmt: skip
_SHARED: Final = {"n_routed_experts": 8, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
_LATENT: Final = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_QWEN: Final = {"num_experts": 8, "moe_intermediate_size": 32}
# name -> configuration class and what it has besides _COMMON; every one has 8 experts in a layer and 2 for a token.
LAYOUTS: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    "mixtral": (tf.MixtralConfig, {"num_local_experts": 8}),
    "qwen3_moe": (tf.Qwen3MoeConfig, {**_QWEN, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe-raw": (tf.Qwen3MoeConfig, {**_QWEN, "head_dim": 16, "norm_topk_prob": False}),
    "qwen2_moe": (tf.Qwen2MoeConfig, {**_QWEN, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]}),
    "olmoe": (tf.OlmoeConfig, {"num_experts": 8}),
    "glm4_moe": (tf.Glm4MoeConfig, {**_SHARED, "head_dim": 16, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": (tf.DeepseekV3Config, {**_SHARED, **_LATENT, "n_group": 2, "topk_group": 1}),
    "glm4_moe-raw": (
        tf.Glm4MoeConfig,
        {**_SHARED, "head_dim": 16, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "gpt_oss": (
        tf.GptOssConfig,
        {"num_local_experts": 8, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
}
FAMILIES: Final = sorted(LAYOUTS)


def make_moe(directory: Path, layout: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write a random model of one of LAYOUTS with the pico tokenizer; biases of routers are no zeros."""
    config_class, own = LAYOUTS[layout]
    make_pico(directory, config_class(**{**_COMMON, **own, **overrides}), dtype)
    weights = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if name.endswith(("e_score_correction_bias", "router.bias", "proj_bias", "sinks")):
            drawn = 0.1 * torch.randn(tensor.shape, generator=generator)
            weights[name] = drawn.float() if "correction" in name else drawn.to(dtype)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    if layout.startswith(("qwen", "olmoe")):
        respell(directory, "num_local_experts", "num_experts")
    return directory


def fuse(directory: Path) -> Path:
    """Rewrite a folder of Qwen's layout with all experts of a layer in two tensors, as transformers holds them."""
    weights = load_file(directory / "model.safetensors")
    for name in [name for name in weights if name.endswith(".experts.0.up_proj.weight")]:
        at = name.removesuffix(".0.up_proj.weight")
        parts = {
            part: torch.stack([weights.pop(f"{at}.{expert}.{part}_proj.weight") for expert in range(8)])
            for part in ("gate", "up", "down")
        }
        weights[f"{at}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        weights[f"{at}.down_proj"] = parts["down"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def respell(directory: Path, name: str, spelled: str) -> None:
    """Rename a field of config.json."""
    path = directory / "config.json"
    content = json.loads(path.read_text())
    content[spelled] = content.pop(name, content.get(spelled))
    path.write_text(json.dumps(content))
