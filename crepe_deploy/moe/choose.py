"""Which experts of every layer stay, by what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .config import ExpertsConfig
from .layers import ExpertLayers
from .measure import LayerStats
from .methods import METHODS


def chosen(stats: Mapping[int, LayerStats], layers: ExpertLayers, config: ExpertsConfig) -> dict[int, list[int]]:
    """For each layer with experts those that stay, in ascending order; equally many in all layers and groups."""
    count, method = layers.count_removed(config.remove), METHODS[config.method]
    kept = {}
    for index in layers.indices:
        gone = method.removed(stats[index], count, layers.groups, seed=config.seed + 7919 * index)
        kept[index] = sorted(set(range(layers.experts)) - set(gone))
    return kept


def effective(picks: Tensor) -> float:
    """How many experts are used evenly for as even a choice as `picks` (experts,) of each: exp of its entropy."""
    shares = picks.double() / picks.sum()
    return float((-(shares * shares.clamp(min=1e-300).log()).sum()).exp())
