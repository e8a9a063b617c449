"""vLLM: architectures `CrepeFAMILYForCausalLM`, models whose layers have widths of their own, on vLLM's own layers.

Each layer is built from its own view of the configuration; everything else is the family's. vLLM imports this module
when it meets such a checkpoint, see `vllm_plugin`.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import extract_layer_index


def layer_config(config: Any, prefix: str) -> Any:
    """The configuration of the layer at `prefix`, its widths included."""
    return config.per_layer_config[extract_layer_index(prefix)]


class CrepeLlamaDecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A Llama layer of its own widths."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, layer_config(config or vllm_config.model_config.hf_config, prefix))


class CrepeLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Llama with widths per layer."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=CrepeLlamaDecoderLayer)


class CrepeMistralDecoderLayer(MistralDecoderLayer):  # type: ignore[misc]
    """A Mistral layer of its own widths."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        super().__init__(vllm_config, prefix, layer_config(config or vllm_config.model_config.hf_config, prefix))


class CrepeMistralForCausalLM(MistralForCausalLM):  # type: ignore[misc]
    """Mistral with widths per layer."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=CrepeMistralDecoderLayer)


class CrepeQwen2DecoderLayer(LlamaDecoderLayer):  # type: ignore[misc]
    """A Qwen2 layer of its own widths: Llama's with biases of q, k and v; vLLM's own derives the size of its heads."""

    def __init__(self, vllm_config: Any, prefix: str = "", config: Any = None) -> None:
        layer = copy.copy(layer_config(config or vllm_config.model_config.hf_config, prefix))
        layer.qkv_bias = True
        super().__init__(vllm_config, prefix, layer)


class CrepeQwen2ForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Qwen2 with widths per layer."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=CrepeQwen2DecoderLayer)


class CrepeQwen3DecoderLayer(Qwen3DecoderLayer):  # type: ignore[misc]
    """A Qwen3 layer of its own widths."""

    def __init__(self, config: Any, cache_config: Any = None, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(layer_config(config, prefix), cache_config, quant_config, prefix)


class CrepeQwen3ForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Qwen3 with widths per layer: Llama's causal model, whose decoder is a method to override, around Qwen's."""

    def _init_model(self, vllm_config: Any, prefix: str = "", layer_type: type[nn.Module] | None = None) -> nn.Module:
        model: nn.Module = Qwen2Model(vllm_config=vllm_config, prefix=prefix, decoder_layer_type=CrepeQwen3DecoderLayer)
        return model
