"""Which experts of a layer go: pure functions of its statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from .measure import LayerStats


class Method(Protocol):
    """Chooses experts of one layer. Experts that saw no token are worth nothing to every method but `random`.

    seed: of this layer.
    """

    def removed(self, stats: LayerStats, count: int, groups: int, seed: int) -> list[int]:
        """`count` experts, in ascending order, equally many of each of `groups` groups of neighbours."""
        ...


@dataclass(frozen=True)
class Reap:
    """Mean over the tokens routed to an expert of router weight x norm of its output (REAP, arXiv 2510.13999)."""

    def removed(self, stats: LayerStats, count: int, groups: int, seed: int) -> list[int]:
        """As of `Method`."""
        return lowest(stats.reap / stats.tokens.clamp(min=1), count, groups)


@dataclass(frozen=True)
class Frequency:
    """How many tokens were routed to an expert."""

    def removed(self, stats: LayerStats, count: int, groups: int, seed: int) -> list[int]:
        """As of `Method`."""
        return lowest(stats.tokens, count, groups)


@dataclass(frozen=True)
class Random:
    """A baseline: any."""

    def removed(self, stats: LayerStats, count: int, groups: int, seed: int) -> list[int]:
        """As of `Method`."""
        generator = torch.Generator().manual_seed(seed)
        return lowest(torch.rand(len(stats.tokens), generator=generator), count, groups)


@dataclass(frozen=True)
class OutputError:
    """The squared error of the layer's output with the removed experts gone, to second order: e^T G e.

    One after another goes the expert that adds least to it, what the removed ones lose already counted: the diagonal
    of G is the exact error of losing one expert, the rest how the errors of two add up or cancel.
    """

    def removed(self, stats: LayerStats, count: int, groups: int, seed: int) -> list[int]:
        """As of `Method`."""
        cost = stats.gram.diagonal().double()
        size, gone = len(cost) // groups, list[int]()
        for _ in range(count):
            full = [group for group in range(groups) if sum(one // size == group for one in gone) == count // groups]
            closed = [*gone, *(one for group in full for one in range(group * size, (group + 1) * size))]
            cost = cost.index_fill(0, torch.tensor(closed, dtype=torch.long), torch.inf)
            gone.append(int(cost.argmin()))
            cost = cost + 2 * stats.gram[gone[-1]].double()
        return sorted(gone)


METHODS: Final[Mapping[str, Method]] = {
    "reap": Reap(),
    "output-error": OutputError(),
    "frequency": Frequency(),
    "random": Random(),
}


def lowest(scores: Tensor, count: int, groups: int) -> list[int]:
    """The `count` lowest of scores (experts,), equally many of each group; of equal ones the first."""
    size = len(scores) // groups
    ranked = scores.view(groups, size).argsort(dim=1, stable=True)[:, : count // groups]
    return sorted((ranked + torch.arange(groups).unsqueeze(1) * size).flatten().tolist())
