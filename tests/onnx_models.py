"""Tiny pruned checkpoints of every family that is exported to ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.sources import resolve_model
from tests.pico import VOCAB, make_pico

# Wide enough that matrices count as large and are streamed; windows short enough that 64 tokens go beyond them.
SHARED: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHARED, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "mistral": MistralConfig(**SHARED, sliding_window=16, tie_word_embeddings=False),
    "mistral without a window": MistralConfig(**SHARED, sliding_window=None, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**{name: value for name, value in SHARED.items() if name != "head_dim"}),
    "qwen3": Qwen3Config(**SHARED, tie_word_embeddings=True),
    "gemma3_text": Gemma3TextConfig(
        **SHARED, sliding_window=16, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=32
    ),
}  # fmt: skip


def pruned_model(folder: Path, family: str = "llama", pattern: str = "2:4") -> Path:
    """A random model of this family under `folder`, pruned; the pruned folder."""
    return pruned_from(folder, CONFIGS[family], pattern)


def pruned_from(folder: Path, config: PretrainedConfig, pattern: str = "2:4") -> Path:
    """A random model of this configuration under `folder`, pruned; the pruned folder."""
    model = make_pico(folder / "model", config)
    prune(resolve_model(str(model)), folder / "pruned", prune_config("magnitude", pattern), None)
    return folder / "pruned"
