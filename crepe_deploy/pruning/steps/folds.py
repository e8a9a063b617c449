"""Where an order of a layer's inputs folds into the layers before it; which layers those are, families.py says.

The inputs of a feed-forward output layer are neurons: reordering the rows of the layers that compute them is free. The
inputs of an attention output layer are the value channels of each head: free within a head, and with grouped heads in
one order for all query heads that read one key-value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.families import Fold, family_of


@dataclass(frozen=True)
class Foldable:
    """A layer of a block whose inputs can be reordered, and the layers whose outputs they are (paths in the block).

    heads: of the inputs, how many equal runs must keep their channels to themselves; 1 for neurons.
    shared: how many consecutive runs must have one order.
    first, step: in a producer's rows, where the first run lies, and how far each is from the one before; step None
    where runs lie side by side, and all of them again and again.
    """

    path: str
    producers: tuple[str, ...]
    heads: int = 1
    shared: int = 1
    first: int = 0
    step: int | None = None

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
        """The order (rows,) of a producer's outputs."""
        width = len(orders[0])
        if self.step is None:  # a fused producer holds the neurons several times over
            once = torch.cat([order + index * width for index, order in enumerate(orders)])
            return torch.cat([once + start for start in range(0, rows, len(once))])
        whole = torch.arange(rows, device=orders[0].device)
        for index, order in enumerate(orders):
            start = self.first + index * self.step
            whole[start : start + width] = order + start
        return whole


def foldables(decoder: Decoder, index: int = 0) -> list[Foldable]:
    """What can be reordered for free in one block of this model; empty where its family is not listed."""
    folds = family_of(decoder.config.model_type).folds
    return [_foldable(fold, decoder.blocks[index], decoder.config) for fold in folds]


def _foldable(fold: Fold, block: nn.Module, config: Any) -> Foldable:
    """The fold in this block, whose layers may have widths of their own."""
    if fold.kind == "neurons":
        return Foldable(fold.path, fold.producers)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    inputs, rows = _width(block, fold.path, 1) // width, _width(block, fold.producers[0], 0) // width
    groups = rows if fold.kind == "values" else (rows - inputs) // 2  # a fused one has as many heads of keys as values
    first, step = {
        "values": (0, width),
        "values last": ((inputs + groups) * width, width),
        "values in heads": (2 * width, 3 * width),
    }[fold.kind]
    return Foldable(fold.path, fold.producers, inputs, inputs // groups, first, step)


def _width(block: nn.Module, path: str, axis: int) -> int:
    """Outputs (axis 0) or inputs (1) of a linear layer of the block, stored (out, in) or, by GPT-2, (in, out)."""
    module = block.get_submodule(path)
    return int(module.get_parameter("weight").shape[axis if isinstance(module, nn.Linear) else 1 - axis])
