"""The families' models with widths per layer: their layers, each built from its own view of the configuration.

Forward passes are the families' own. This file imports nothing but torch, transformers and its neighbour, so that it
can also lie beside the weights as remote code.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2ForCausalLM, Gemma2Model
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM, Gemma3TextModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3ForCausalLM, Phi3Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model

from .configuration_crepe import (
    CrepeGemma2Config,
    CrepeGemma3TextConfig,
    CrepeLlamaConfig,
    CrepeMistralConfig,
    CrepePhi3Config,
    CrepeQwen2Config,
    CrepeQwen3Config,
)


class PerLayer:
    """A decoder layer of the widths that `config.per_layer_config` gives it."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config.per_layer_config[layer_idx], layer_idx)  # type: ignore[call-arg]
        # The view is a copy: a later change of the attention implementation happens to the whole configuration.
        self.self_attn: Any
        self.self_attn.config = config


class PerLayerModel:
    """A decoder of such layers. layer: their class."""

    layer: ClassVar[type[nn.Module]]

    def __init__(self, config: Any) -> None:
        super().__init__(without_layers(config))  # type: ignore[call-arg]
        add_layers(self, config, self.layer)


class PerLayerCausal:
    """A causal model around such a decoder. family: the stock causal model, whose forward pass is inherited.

    decoder: the class of the decoder.
    """

    family: ClassVar[Any]
    decoder: ClassVar[type[nn.Module]]

    def __init__(self, config: Any) -> None:
        # Past the family's constructor, which builds layers of one width.
        super(self.family, self).__init__(config)  # type: ignore[call-arg]
        add_head(self, config, self.decoder(config))


def without_layers(config: Any) -> Any:
    """A configuration with which a family's own constructor builds everything but layers."""
    empty = copy.copy(config.per_layer_config[0])
    empty.num_hidden_layers = 0
    return empty


def add_layers(model: Any, config: Any, layer_type: type[nn.Module]) -> None:
    """Give a model built `without_layers` its layers and its real configuration."""
    config._attn_implementation = model.config._attn_implementation
    model.config = config
    model.layers = nn.ModuleList(layer_type(config, index) for index in range(config.num_hidden_layers))
    model.post_init()


def add_head(model: Any, config: Any, base: nn.Module) -> None:
    """Give a bare causal model its decoder and its head, as the families' constructors do."""
    model.model = base
    model.vocab_size = config.vocab_size
    model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    model.post_init()


class HeadCount:
    """A configuration, but for its head count, which Phi-3's attention reads while it runs: that of one layer."""

    def __init__(self, whole: Any, heads: int) -> None:
        self.whole = whole
        self.num_attention_heads = heads

    def __getattr__(self, name: str) -> Any:
        if name == "whole" or name.startswith("__"):  # asked for while a copy of this is being made
            raise AttributeError(name)
        return getattr(self.whole, name)


class CrepeGemma2DecoderLayer(PerLayer, Gemma2DecoderLayer):  # type: ignore[misc]
    """A Gemma 2 layer of its own widths."""


class CrepeGemma2Model(PerLayerModel, Gemma2Model):  # type: ignore[misc]
    """Gemma 2's decoder with widths per layer."""

    config_class = CrepeGemma2Config
    _no_split_modules = ("CrepeGemma2DecoderLayer",)
    layer = CrepeGemma2DecoderLayer


class CrepeGemma2ForCausalLM(PerLayerCausal, Gemma2ForCausalLM):  # type: ignore[misc]
    """Gemma 2 with widths per layer."""

    config_class = CrepeGemma2Config
    family = Gemma2ForCausalLM
    decoder = CrepeGemma2Model


class CrepeGemma3TextDecoderLayer(PerLayer, Gemma3DecoderLayer):  # type: ignore[misc]
    """A Gemma 3 layer of its own widths."""


class CrepeGemma3TextModel(PerLayerModel, Gemma3TextModel):  # type: ignore[misc]
    """Gemma 3's decoder with widths per layer."""

    config_class = CrepeGemma3TextConfig
    _no_split_modules = ("CrepeGemma3TextDecoderLayer",)
    layer = CrepeGemma3TextDecoderLayer


class CrepeGemma3TextForCausalLM(PerLayerCausal, Gemma3ForCausalLM):  # type: ignore[misc]
    """Gemma 3 with widths per layer."""

    config_class = CrepeGemma3TextConfig
    family = Gemma3ForCausalLM
    decoder = CrepeGemma3TextModel


class CrepeLlamaDecoderLayer(PerLayer, LlamaDecoderLayer):  # type: ignore[misc]
    """A Llama layer of its own widths."""


class CrepeLlamaModel(PerLayerModel, LlamaModel):  # type: ignore[misc]
    """Llama's decoder with widths per layer."""

    config_class = CrepeLlamaConfig
    _no_split_modules = ("CrepeLlamaDecoderLayer",)
    layer = CrepeLlamaDecoderLayer


class CrepeLlamaForCausalLM(PerLayerCausal, LlamaForCausalLM):  # type: ignore[misc]
    """Llama with widths per layer."""

    config_class = CrepeLlamaConfig
    family = LlamaForCausalLM
    decoder = CrepeLlamaModel


class CrepeMistralDecoderLayer(PerLayer, MistralDecoderLayer):  # type: ignore[misc]
    """A Mistral layer of its own widths."""


class CrepeMistralModel(PerLayerModel, MistralModel):  # type: ignore[misc]
    """Mistral's decoder with widths per layer."""

    config_class = CrepeMistralConfig
    _no_split_modules = ("CrepeMistralDecoderLayer",)
    layer = CrepeMistralDecoderLayer


class CrepeMistralForCausalLM(PerLayerCausal, MistralForCausalLM):  # type: ignore[misc]
    """Mistral with widths per layer."""

    config_class = CrepeMistralConfig
    family = MistralForCausalLM
    decoder = CrepeMistralModel


class CrepePhi3DecoderLayer(PerLayer, Phi3DecoderLayer):  # type: ignore[misc]
    """A Phi-3 layer of its own widths."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.self_attn.config = HeadCount(config, config.per_layer_config[layer_idx].num_attention_heads)


class CrepePhi3Model(PerLayerModel, Phi3Model):  # type: ignore[misc]
    """Phi-3's decoder with widths per layer."""

    config_class = CrepePhi3Config
    _no_split_modules = ("CrepePhi3DecoderLayer",)
    layer = CrepePhi3DecoderLayer


class CrepePhi3ForCausalLM(PerLayerCausal, Phi3ForCausalLM):  # type: ignore[misc]
    """Phi-3 with widths per layer."""

    config_class = CrepePhi3Config
    family = Phi3ForCausalLM
    decoder = CrepePhi3Model


class CrepeQwen2DecoderLayer(PerLayer, Qwen2DecoderLayer):  # type: ignore[misc]
    """A Qwen2 layer of its own widths."""


class CrepeQwen2Model(PerLayerModel, Qwen2Model):  # type: ignore[misc]
    """Qwen2's decoder with widths per layer."""

    config_class = CrepeQwen2Config
    _no_split_modules = ("CrepeQwen2DecoderLayer",)
    layer = CrepeQwen2DecoderLayer


class CrepeQwen2ForCausalLM(PerLayerCausal, Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen2 with widths per layer."""

    config_class = CrepeQwen2Config
    family = Qwen2ForCausalLM
    decoder = CrepeQwen2Model


class CrepeQwen3DecoderLayer(PerLayer, Qwen3DecoderLayer):  # type: ignore[misc]
    """A Qwen3 layer of its own widths."""


class CrepeQwen3Model(PerLayerModel, Qwen3Model):  # type: ignore[misc]
    """Qwen3's decoder with widths per layer."""

    config_class = CrepeQwen3Config
    _no_split_modules = ("CrepeQwen3DecoderLayer",)
    layer = CrepeQwen3DecoderLayer


class CrepeQwen3ForCausalLM(PerLayerCausal, Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3 with widths per layer."""

    config_class = CrepeQwen3Config
    family = Qwen3ForCausalLM
    decoder = CrepeQwen3Model
