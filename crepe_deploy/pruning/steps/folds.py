"""Where an order of a layer's inputs folds into the layers before it, by model family.

The inputs of a feed-forward output layer are neurons: reordering the rows of the layers that compute them is free. The
inputs of an attention output layer are the value channels of each head: free within a head, and with grouped heads in
one order for all query heads that read one key-value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.families import family_of


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
    return [
        Foldable(fold.path, fold.producers, *(_heads(config) if fold.kind == "values" else ()))
        for fold in family_of(config.model_type).folds
    ]


def _heads(config: Any) -> tuple[int, int]:
    """(heads, heads that share their values)."""
    heads = int(config.num_attention_heads)
    return heads, heads // int(getattr(config, "num_key_value_heads", None) or heads)
