"""vLLM: architectures `CrepeFAMILYForCausalLM`, models whose layers have widths of their own, on vLLM's own layers.

Each layer is built from its own view of the configuration; everything else is the family's. vLLM imports this module
when it meets such a checkpoint, see `vllm_plugin`.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import nn
from vllm.model_executor.models.gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import extract_layer_index, make_layers, maybe_prefix


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


class CrepePhi3ForCausalLM(Phi3ForCausalLM):  # type: ignore[misc]
    """Phi-3 with widths per layer, on Llama's layers as in vLLM itself."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=CrepeLlamaDecoderLayer)


class GemmaPerLayer:
    """A Gemma with widths per layer: vLLM's classes name their own layers, so the model is built without any first."""

    layer: ClassVar[Any]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        super().__init__(vllm_config=without_layers(vllm_config), prefix=prefix)  # type: ignore[call-arg]
        self.config = config
        model: Any = self.model  # type: ignore[attr-defined]
        model.config = config
        model.vllm_config = vllm_config  # what the hash of compiled code is made of: widths are in it
        model.start_layer, model.end_layer, model.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: self.layer(
                layer_config(config, prefix), vllm_config.cache_config, vllm_config.quant_config, prefix=prefix
            ),
            prefix=f"{maybe_prefix(prefix, 'model')}.layers",
        )


def without_layers(vllm_config: Any) -> Any:
    """A copy of vLLM's configuration with which a model's constructor builds everything but layers."""
    empty = copy.copy(vllm_config)
    empty.model_config = copy.copy(vllm_config.model_config)
    empty.model_config.hf_config = copy.copy(layer_config(vllm_config.model_config.hf_config, "layers.0"))
    empty.model_config.hf_config.num_hidden_layers = 0
    return empty


class CrepeGemma2ForCausalLM(GemmaPerLayer, Gemma2ForCausalLM):  # type: ignore[misc]
    """Gemma 2 with widths per layer."""

    layer = Gemma2DecoderLayer


class CrepeGemma3TextForCausalLM(GemmaPerLayer, Gemma3ForCausalLM):  # type: ignore[misc]
    """Gemma 3, text only, with widths per layer."""

    layer = Gemma3DecoderLayer
