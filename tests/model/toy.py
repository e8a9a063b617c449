"""A decoder of a family that nobody has heard of: registered with transformers, and with module names of its own."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from crepe_deploy.model.families import Family, Fold, Residual

NAME = "toy_decoder"
# All that crepe-deploy has to be told about it.
ENTRY = Family(
    residuals=(Residual("gather.merge", "", norm="calm"), Residual("digest.narrow", "before_digest")),
    folds=(Fold("digest.narrow", ("digest.widen",)), Fold("gather.merge", ("gather.ask_and_tell",), "values last")),
    last_norm="trunk.finish",
)


class ToyConfig(tf.PretrainedConfig):
    model_type = NAME

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"vocab_size": 320, "hidden_size": 64, "bos_token_id": 0, "eos_token_id": 1, **kwargs})
        self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads = 3, 4, 2
        self.intermediate_size, self.max_position_embeddings = 128, 128
        self.tie_word_embeddings = False


class Gather(nn.Module):
    """Attention; queries, keys and values of grouped heads come from one layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, 16
        self.ask_and_tell = nn.Linear(config.hidden_size, (self.heads + 2 * self.groups) * self.width)
        self.merge = nn.Linear(self.heads * self.width, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        split = [self.heads * self.width, self.groups * self.width, self.groups * self.width]
        asked, told, values = (
            part.view(batch, length, -1, self.width).transpose(1, 2)
            for part in self.ask_and_tell(hidden).split(split, dim=-1)
        )
        read = nn.functional.scaled_dot_product_attention(asked, told, values, is_causal=True, enable_gqa=True)
        return self.merge(read.transpose(1, 2).reshape(batch, length, -1))


class Digest(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.widen = nn.Linear(config.hidden_size, config.intermediate_size)
        self.narrow = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.narrow(nn.functional.silu(self.widen(hidden)))


class Stage(nn.Module):
    """The output of attention passes a norm on its way to the stream, that of the feed-forward layer does not."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.before_gather, self.calm, self.before_digest = (nn.RMSNorm(config.hidden_size, 1e-6) for _ in range(3))
        self.gather, self.digest = Gather(config), Digest(config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.calm(self.gather(self.before_gather(hidden)))
        return hidden + self.digest(self.before_digest(hidden))


class ToyModel(tf.PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "trunk"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stages = nn.ModuleList(Stage(config) for _ in range(config.num_hidden_layers))
        self.finish = nn.RMSNorm(config.hidden_size, 1e-6)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        hidden = self.words(input_ids)
        for stage in self.stages:
            hidden = stage(hidden)
        return BaseModelOutput(last_hidden_state=self.finish(hidden))


class ToyForCausalLM(tf.PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "trunk"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.trunk = ToyModel(config)
        self.readout = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.readout(self.trunk(input_ids).last_hidden_state))


def register() -> None:
    """Make transformers know the model type, as `import` of a package with models of its own does."""
    tf.AutoConfig.register(NAME, ToyConfig, exist_ok=True)
    tf.AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM, exist_ok=True)


def uneven(model: nn.Module) -> None:
    """Give the norms gains of many sizes, as trained ones have."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("calm" in name or "before" in name or "finish" in name):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
