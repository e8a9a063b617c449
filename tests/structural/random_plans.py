"""Tiny random models of the families, and random plans for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from crepe_deploy.structural.plan import Geometry, LayerPlan
from tests.pico import VOCAB, make_pico

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3_text": Gemma3TextConfig,
    "phi3": Phi3Config,
}
# What the families need besides `SIZES`, so that their own features are there: windows, both kinds of layer, soft caps.
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 12, "sliding_window": 8, "attn_logit_softcapping": 20.0, "pad_token_id": 1},
    "gemma3_text": {
        "query_pre_attn_scalar": 12, "sliding_window": 8, "pad_token_id": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"pad_token_id": 1},
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
Kept = tuple[int, int, int]  # KV groups, query heads in each, neurons
UNEVEN: tuple[Kept, ...] = ((4, 2, 96), (1, 2, 32), (3, 1, 50))


def family_config(family: str, **overrides: Any) -> PretrainedConfig:
    """The configuration of `SIZES` of one family."""
    return CONFIGS[family](**{**SIZES, **OWN.get(family, {}), **overrides})


def make_model(folder: Path, family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A random model of `SIZES` whose norms and biases are random too, so that nothing is right by luck."""
    make_pico(folder, family_config(family, **overrides), dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
    model.save_pretrained(folder)
    return folder


def random_plans(geometry: Geometry, kept: Sequence[Kept], seed: int = 0) -> list[LayerPlan]:
    """For each layer a plan that keeps random units of these numbers, with random refit weights."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int, total: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(total, generator=generator)[:count].tolist()))

    def weight(columns: int) -> Tensor:
        return 0.2 * torch.randn(geometry.hidden, columns, generator=generator)

    return [
        LayerPlan(
            some(groups, geometry.kv_heads),
            tuple(some(queries, geometry.queries_per_group) for _ in range(groups)),
            some(neurons, geometry.intermediate),
            weight(groups * queries * geometry.head_dim),
            weight(neurons),
        )
        for groups, queries, neurons in kept
    ]


@torch.inference_mode()
def masked_model_logits(folder: Path, plans: Sequence[LayerPlan], tokens: Tensor) -> Tensor:
    """Logits of the whole model, dropped columns of o_proj and down_proj zero, refit ones scattered, by loops."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_group = config.num_attention_heads // config.num_key_value_heads
    for layer, plan in zip(model.model.layers, plans, strict=True):
        output, down = layer.self_attn.o_proj.weight.data.zero_(), layer.mlp.down_proj.weight.data.zero_()
        column = 0
        for group, queries in zip(plan.groups, plan.queries, strict=True):
            for query in queries:
                for feature in range(size):
                    output[:, (group * per_group + query) * size + feature] = plan.o_proj[:, column]
                    column += 1
        for position, neuron in enumerate(plan.neurons):
            down[:, neuron] = plan.down_proj[:, position]
    logits: Tensor = model(tokens).logits
    return logits
