"""Configurations of models whose layers have widths of their own: a family's configuration and `per_layer_config`.

    {"model_type": "crepe_llama", ..., "head_dim": 64, "per_layer_config": {"3": {"num_key_value_heads": 2, ...}, ...}}

This file imports nothing but transformers, so that it can also lie beside the weights as remote code.
"""

from __future__ import annotations

from typing import Any

from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config


class PerLayerWidths:
    """What sets these configurations apart: widths are read, and checked, layer by layer."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.validate()

    def validate_architecture(self) -> None:
        """Raise ValueError for a layer that no attention can have."""
        for index, layer in enumerate(self.per_layer_config):  # type: ignore[attr-defined]
            heads, groups, neurons = layer.num_attention_heads, layer.num_key_value_heads, layer.intermediate_size
            if min(heads, groups, neurons) < 1 or heads % groups:
                raise ValueError(f"layer {index}: {heads} query heads, {groups} KV heads and {neurons} neurons")

    def validate(self) -> None:
        """The family's own checks read widths of the whole model, which there are none of."""
        self.validate_architecture()


class CrepeLlamaConfig(PerLayerWidths, LlamaConfig):  # type: ignore[misc]
    """Llama with widths per layer."""

    model_type = "crepe_llama"


class CrepeMistralConfig(PerLayerWidths, MistralConfig):  # type: ignore[misc]
    """Mistral with widths per layer."""

    model_type = "crepe_mistral"


class CrepeQwen2Config(PerLayerWidths, Qwen2Config):  # type: ignore[misc]
    """Qwen2 with widths per layer; `head_dim` is stated."""

    model_type = "crepe_qwen2"


class CrepeQwen3Config(PerLayerWidths, Qwen3Config):  # type: ignore[misc]
    """Qwen3 with widths per layer."""

    model_type = "crepe_qwen3"


class CrepeGemma2Config(PerLayerWidths, Gemma2Config):  # type: ignore[misc]
    """Gemma 2 with widths per layer."""

    model_type = "crepe_gemma2"


class CrepeGemma3TextConfig(PerLayerWidths, Gemma3TextConfig):  # type: ignore[misc]
    """Gemma 3, text only, with widths per layer."""

    model_type = "crepe_gemma3_text"


class CrepePhi3Config(PerLayerWidths, Phi3Config):  # type: ignore[misc]
    """Phi-3 with widths per layer; `head_dim` is stated."""

    model_type = "crepe_phi3"

    def validate_rope(self) -> None:
        """Phi-3's checks, which vLLM asks for, count rotary factors by a head count of the whole model."""
