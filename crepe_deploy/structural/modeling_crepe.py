"""The families' models with widths per layer: their layers, each built from its own view of the configuration.

Forward passes are the families' own. This file imports nothing but torch, transformers and its neighbour, so that it
can also lie beside the weights as remote code.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM, MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3Model

from .configuration_crepe import CrepeLlamaConfig, CrepeMistralConfig, CrepeQwen2Config, CrepeQwen3Config


class PerLayer:
    """A decoder layer of the widths that `config.per_layer_config` gives it."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config.per_layer_config[layer_idx], layer_idx)  # type: ignore[call-arg]
        # The view is a copy: a later change of the attention implementation happens to the whole configuration.
        self.self_attn: Any
        self.self_attn.config = config


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


class CrepeLlamaDecoderLayer(PerLayer, LlamaDecoderLayer):  # type: ignore[misc]
    """A Llama layer of its own widths."""


class CrepeLlamaModel(LlamaModel):  # type: ignore[misc]
    """Llama's decoder with widths per layer."""

    config_class = CrepeLlamaConfig
    _no_split_modules = ("CrepeLlamaDecoderLayer",)

    def __init__(self, config: CrepeLlamaConfig) -> None:
        super().__init__(without_layers(config))
        add_layers(self, config, CrepeLlamaDecoderLayer)


class CrepeLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """Llama with widths per layer."""

    config_class = CrepeLlamaConfig

    def __init__(self, config: CrepeLlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # past the constructor that builds layers of one width
        add_head(self, config, CrepeLlamaModel(config))


class CrepeMistralDecoderLayer(PerLayer, MistralDecoderLayer):  # type: ignore[misc]
    """A Mistral layer of its own widths."""


class CrepeMistralModel(MistralModel):  # type: ignore[misc]
    """Mistral's decoder with widths per layer."""

    config_class = CrepeMistralConfig
    _no_split_modules = ("CrepeMistralDecoderLayer",)

    def __init__(self, config: CrepeMistralConfig) -> None:
        super().__init__(without_layers(config))
        add_layers(self, config, CrepeMistralDecoderLayer)


class CrepeMistralForCausalLM(MistralForCausalLM):  # type: ignore[misc]
    """Mistral with widths per layer."""

    config_class = CrepeMistralConfig

    def __init__(self, config: CrepeMistralConfig) -> None:
        super(MistralForCausalLM, self).__init__(config)
        add_head(self, config, CrepeMistralModel(config))


class CrepeQwen2DecoderLayer(PerLayer, Qwen2DecoderLayer):  # type: ignore[misc]
    """A Qwen2 layer of its own widths."""


class CrepeQwen2Model(Qwen2Model):  # type: ignore[misc]
    """Qwen2's decoder with widths per layer."""

    config_class = CrepeQwen2Config
    _no_split_modules = ("CrepeQwen2DecoderLayer",)

    def __init__(self, config: CrepeQwen2Config) -> None:
        super().__init__(without_layers(config))
        add_layers(self, config, CrepeQwen2DecoderLayer)


class CrepeQwen2ForCausalLM(Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen2 with widths per layer."""

    config_class = CrepeQwen2Config

    def __init__(self, config: CrepeQwen2Config) -> None:
        super(Qwen2ForCausalLM, self).__init__(config)
        add_head(self, config, CrepeQwen2Model(config))


class CrepeQwen3DecoderLayer(PerLayer, Qwen3DecoderLayer):  # type: ignore[misc]
    """A Qwen3 layer of its own widths."""


class CrepeQwen3Model(Qwen3Model):  # type: ignore[misc]
    """Qwen3's decoder with widths per layer."""

    config_class = CrepeQwen3Config
    _no_split_modules = ("CrepeQwen3DecoderLayer",)

    def __init__(self, config: CrepeQwen3Config) -> None:
        super().__init__(without_layers(config))
        add_layers(self, config, CrepeQwen3DecoderLayer)


class CrepeQwen3ForCausalLM(Qwen3ForCausalLM):  # type: ignore[misc]
    """Qwen3 with widths per layer."""

    config_class = CrepeQwen3Config

    def __init__(self, config: CrepeQwen3Config) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)
        add_head(self, config, CrepeQwen3Model(config))
