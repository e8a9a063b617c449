"""What the next block is fed while a supernet is built: the paper's expectation over levels, and its ablations.

Eq. 5 feeds block l + 1 the mean of what block l puts out at its levels e, weighted by 1 - S_e, the share kept. `o_proj`
and `down_proj` are linear and everything removed reaches the block's output through them, so the mean of the outputs is
the output of the mean weight, W_bar = sum (1 - S_e) W_e / sum (1 - S_e), with zeros where a level removed a channel.
(The mean is taken for each projection on its own, and the FFN reads what the mean attention leaves.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError

from .levels import Level

# expectation: Eq. 5. uniform: all levels alike. single: the level in the middle alone. none: the dense block.
ACCUMULATIONS = ("expectation", "uniform", "single", "none")


def level_shares(kept: Sequence[int], centre: int, how: str) -> list[float]:
    """The share of each level in the mean; they add up to 1.

    kept: channels that each level keeps. centre: the position of the middle level. how: not "none".
    Raises ConfigError for an unknown name.
    """
    if how not in ACCUMULATIONS or how == "none":
        raise ConfigError(f"accumulation '{how}' has no mean; those that have: {', '.join(ACCUMULATIONS[:-1])}")
    if how == "single":
        return [float(position == centre) for position in range(len(kept))]
    worth = [float(count) if how == "expectation" else 1.0 for count in kept]
    return [share / sum(worth) for share in worth]


def mean_weight(levels: Sequence[Level], shares: Sequence[float], size: int) -> Tensor:
    """W_bar (hidden, size) in the levels' dtype, added up in fp32; a level with a share of 0 is not touched."""
    total = torch.zeros(levels[0].weight.shape[0], size, device=levels[0].weight.device)
    for level, share in zip(levels, shares, strict=True):
        if share:
            total.index_add_(1, level.columns, level.weight.float(), alpha=share)
    return total.to(levels[0].weight.dtype)
