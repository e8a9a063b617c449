"""Where an order of a layer's inputs folds into the layers before it, by model family.

The inputs of a feed-forward output layer are neurons: reordering the rows of the layers that compute them is free. The
inputs of an attention output layer are the value channels of each head: free within a head, and with grouped heads in
one order for all query heads that read one key-value head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crepe_deploy.model.decoder import Decoder
from crepe_deploy.structural.layout import PER_LAYER_CLASSES

GATED = (("mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj")),)
# Per model type: (reordered layer, layers whose rows follow), feed-forward; then the same for attention heads.
NEURONS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), GATED),
    **dict.fromkeys(PER_LAYER_CLASSES, GATED),
    "phi3": (("mlp.down_proj", ("mlp.gate_up_proj",)),),
    "opt": (("fc2", ("fc1",)),),
    "gpt_neox": (("mlp.dense_4h_to_h", ("mlp.dense_h_to_4h",)),),
    "gpt2": (("mlp.c_proj", ("mlp.c_fc",)),),
}
VALUES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), ("self_attn.o_proj", "self_attn.v_proj")
    ),
    "opt": ("self_attn.out_proj", "self_attn.v_proj"),
}


@dataclass(frozen=True)
class Foldable:
    """A layer of a block whose inputs can be reordered, and the layers whose outputs they are (paths in the block).

    heads: of the inputs, how many equal runs must keep their channels to themselves; 1 for neurons.
    shared: how many consecutive runs must have one order.
    """

    path: str
    producers: tuple[str, ...]
    heads: int = 1
    shared: int = 1

    def search_rows(self, score: Tensor) -> list[Tensor]:
        """`score` (out, in) -> for each order to be found the scores that it decides on (rows, channels)."""
        width = score.shape[1] // self.heads
        runs = torch.split(score, width, dim=1)
        return [torch.cat(runs[start : start + self.shared]) for start in range(0, self.heads, self.shared)]

    def input_order(self, orders: list[Tensor]) -> Tensor:
        """The order (in,) of all inputs from those of `search_rows`."""
        width = len(orders[0])
        return torch.cat([orders[head // self.shared] + head * width for head in range(self.heads)])

    def output_order(self, orders: list[Tensor], rows: int) -> Tensor:
        """The order (rows,) of a producer's outputs; a fused one holds the neurons several times over."""
        width = len(orders[0])
        once = torch.cat([order + index * width for index, order in enumerate(orders)])
        return torch.cat([once + start for start in range(0, rows, len(once))])


def foldables(decoder: Decoder) -> list[Foldable]:
    """What can be reordered for free in every block of this model; empty where its family is not listed."""
    config = decoder.config
    found = [Foldable(path, producers) for path, producers in NEURONS.get(config.model_type, ())]
    if config.model_type in VALUES:
        path, producer = VALUES[config.model_type]
        heads = int(config.num_attention_heads)
        groups = int(getattr(config, "num_key_value_heads", None) or heads)
        found.append(Foldable(path, (producer,), heads, heads // groups))
    return found
