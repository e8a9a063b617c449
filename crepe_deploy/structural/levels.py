"""Levels: one output projection pruned to every width that the search may ask for, from one sweep over its channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crepe_deploy.errors import CalibrationError, ConfigError
from crepe_deploy.model.stats import Need, Stats
from crepe_deploy.nearest import unknown

from .local import DAMPING, DEFAULT_VARIANT, VARIANTS, Quadratic, quadratic, refit_nested, removal_order
from .plan import Geometry, LayerPlan, head_features

AttentionSize = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Level:
    """One projection at one width. columns: kept input channels, ascending, int64 (kept,). weight: (hidden, kept).

    groups, queries: of an attention level, as in `LayerPlan`; empty for an FFN level.
    """

    columns: Tensor
    weight: Tensor
    groups: tuple[int, ...] = ()
    queries: tuple[tuple[int, ...], ...] = ()

    def full(self, size: int) -> Tensor:
        """The weight (hidden, size) with zeros where channels went."""
        dense = self.weight.new_zeros(self.weight.shape[0], size)
        dense[:, self.columns] = self.weight
        return dense


def layer_plan(attention: Level, neurons: Level) -> LayerPlan:
    """The two levels as one layer's plan. Raises ConfigError for what no layer can be."""
    kept = tuple(neurons.columns.tolist())
    return LayerPlan(attention.groups, attention.queries, kept, attention.weight, neurons.weight)


def flap(weight: Tensor, stats: Stats) -> Tensor:
    """FLAP's fluctuation (An et al., AAAI 2024): the input's variance times its column's squared norm, (in,)."""
    if stats.variance is None:
        raise CalibrationError("FLAP's score needs the variance of the layer's input")
    return stats.variance.double() * weight.double().square().sum(0)


def magnitude(weight: Tensor, stats: Stats) -> Tensor:
    """Squared norms of the columns, (in,)."""
    return weight.double().square().sum(0)


# What a channel is worth without a sweep, (in,) fp64 from weight (out, in) and statistics: the baselines.
SCORES: dict[str, Callable[[Tensor, Stats], Tensor]] = {"flap": flap, "magnitude": magnitude}


@dataclass(frozen=True)
class LocalRules:
    """How a projection is pruned.

    select: "saliency" (a sweep with `variant`), "flap", "magnitude" or "random". refit: solve for the kept weights;
    otherwise they stay as they are. per_round: neurons removed between two updates (the paper: 16; heads go one by
    one). seed: of "random".
    """

    variant: str = DEFAULT_VARIANT
    select: str = "saliency"
    refit: bool = True
    per_round: int = 16
    damping: float = DAMPING
    seed: int = 0

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(unknown("--variant", self.variant, VARIANTS))
        known = ("saliency", "random", *SCORES)
        if self.select not in known:
            raise ConfigError(unknown("selection", self.select, known))

    @property
    def needs(self) -> frozenset[Need]:
        """Statistics of the inputs that are read."""
        needs: set[Need] = {"moments"} if self.select == "flap" else set()
        if self.refit or self.select == "saliency":
            needs.add("hessian")
        return frozenset(needs)


@dataclass(frozen=True, eq=False)
class _Projection:
    """A stored weight (out, in) about to be pruned; salt: tells it from the others where order is random."""

    weight: Tensor
    stats: Stats
    rules: LocalRules
    salt: int

    def problem(self) -> Quadratic | None:
        """What the refit and the sweep minimise, where there is one."""
        return quadratic(self.weight, self.stats, self.rules.damping) if "hessian" in self.rules.needs else None

    def scores(self) -> Tensor:
        """(in,): what each channel is worth without a sweep."""
        if self.rules.select == "random":
            generator = torch.Generator().manual_seed(self.rules.seed * 1_000_003 + self.salt)
            drawn = torch.rand(self.weight.shape[1], generator=generator, dtype=torch.float64)
            return drawn.to(self.weight.device)  # drawn on the host: the same wherever it computes
        return SCORES[self.rules.select](self.weight, self.stats)

    def order(
        self, problem: Quadratic | None, channels: Tensor, units: Tensor, remaining: int, per_round: int,
        classes: list[int] | None = None,
    ) -> list[int]:  # fmt: skip
        """Units removed, the first one first. units: (count, size), positions in `channels`; problem: on `channels`."""
        if self.rules.select == "saliency":
            assert problem is not None
            return removal_order(
                problem, units, self.rules.variant, remaining=remaining, per_round=per_round, classes=classes
            )
        worth = self.scores()[channels][units].mean(1)
        order = worth.argsort(stable=True).tolist()
        if classes is None:
            return list(order[: len(units) - remaining])
        queues = [[unit for unit in order if classes[unit] == label] for label in sorted(set(classes))]
        rounds = (len(units) - remaining) // len(queues)
        return [queue[place] for place in range(rounds) for queue in queues]

    def weights(self, problem: Quadratic | None, columns: Tensor, kept: list[Tensor]) -> list[Tensor]:
        """The weight (out, len(k)) for each k of `kept`: nested, ascending positions in `columns`, largest first."""
        if not self.rules.refit or problem is None:
            return [self.weight[:, columns[stay]] for stay in kept]
        order, last = [kept[-1]], kept[-1]
        for stay in reversed(kept[:-1]):
            order.append(stay[~torch.isin(stay, last)])
            last = stay
        nested = torch.cat(order)
        refits = refit_nested(problem, nested, [len(stay) for stay in kept])
        weights = []
        for stay, rows in zip(kept, refits, strict=True):
            ascending = nested[: len(stay)].argsort()
            weights.append(rows[ascending].T.to(self.weight.dtype).contiguous())
            if len(stay) == self.weight.shape[1] and self.stats.cross is None:
                weights[-1] = self.weight.clone()  # nothing is removed: not even a rounding
        return weights


def neuron_levels(
    weight: Tensor, stats: Stats, sizes: Sequence[int], rules: LocalRules, salt: int = 0
) -> dict[int, Level]:
    """A stored `down_proj` (hidden, neurons) at every number of neurons in `sizes`; the sets are nested.

    The levels have the dtype of `weight`, which is not changed. Raises NumericalError, CalibrationError.
    """
    projection = _Projection(weight, stats, rules, salt)
    wanted = sorted(set(sizes), reverse=True)
    problem, everything = projection.problem(), torch.arange(weight.shape[1], device=weight.device)
    removed = projection.order(problem, everything, everything.unsqueeze(1), wanted[-1], rules.per_round)
    kept = [_without(everything, removed[: weight.shape[1] - size]) for size in wanted]
    weights = projection.weights(problem, everything, kept)
    return {
        size: Level(columns, pruned) for size, columns, pruned in zip(wanted, kept, weights, strict=True)
    }  # fmt: skip


def attention_levels(
    weight: Tensor, stats: Stats, sizes: Sequence[AttentionSize], geometry: Geometry, rules: LocalRules, salt: int = 0
) -> dict[AttentionSize, Level]:
    """A stored `o_proj` (hidden, heads * head_dim) at every (KV groups, query heads in each) of `sizes`.

    Whole groups go first, one by one; then each kept group loses its lowest query head at a time, so that all stay
    alike. Raises NumericalError, CalibrationError.
    """
    projection = _Projection(weight, stats, rules, salt)
    problem, everything = projection.problem(), torch.arange(weight.shape[1], device=weight.device)
    fewest = min(groups for groups, _ in sizes)
    by_group = everything.view(geometry.kv_heads, -1)
    removed = projection.order(problem, everything, by_group, fewest, 1)
    levels: dict[AttentionSize, Level] = {}
    whole = sorted({groups for groups, queries in sizes if queries == geometry.queries_per_group}, reverse=True)
    stay = {
        count: _without(torch.arange(geometry.kv_heads, device=weight.device), removed[: geometry.kv_heads - count])
        for count in {groups for groups, _ in sizes}
    }
    if whole:
        kept = [by_group[stay[count]].flatten() for count in whole]
        for count, columns, level in zip(whole, kept, projection.weights(problem, everything, kept), strict=True):
            heads = tuple(tuple(range(geometry.queries_per_group)) for _ in range(count))
            levels[count, geometry.queries_per_group] = Level(columns, level, tuple(stay[count].tolist()), heads)
    for count, groups in stay.items():
        fewer = sorted({queries for at, queries in sizes if at == count} - {geometry.queries_per_group}, reverse=True)
        if fewer:
            levels |= _fewer_queries(projection, problem, geometry, tuple(groups.tolist()), fewer)
    return levels


def _fewer_queries(
    projection: _Projection, problem: Quadratic | None, geometry: Geometry, groups: tuple[int, ...], counts: list[int]
) -> dict[AttentionSize, Level]:
    """Levels of these groups with fewer query heads in each; counts: descending, below all of them."""
    size = geometry.queries_per_group
    heads = [group * size + query for group in groups for query in range(size)]
    device = projection.weight.device
    channels = head_features(heads, geometry.head_dim).to(device)
    inner = None if problem is None else problem.restrict(channels)
    units = torch.arange(len(channels), device=device).view(len(heads), geometry.head_dim)
    labels = [position // size for position in range(len(heads))]
    removed = projection.order(inner, channels, units, len(groups) * counts[-1], 1, labels)
    everyone = torch.arange(len(heads), device=device)
    stays = [_without(everyone, removed[: len(groups) * (size - count)]) for count in counts]
    kept = [units[stay].flatten() for stay in stays]
    weights = projection.weights(inner, channels, kept)
    levels = {}
    for count, stay, places, weight in zip(counts, stays, kept, weights, strict=True):
        queries = tuple(
            tuple(int(head) % size for head in stay.tolist() if head // size == place) for place in range(len(groups))
        )
        levels[len(groups), count] = Level(channels[places], weight, groups, queries)
    return levels


def _without(everything: Tensor, removed: Sequence[int]) -> Tensor:
    kept = torch.ones_like(everything, dtype=torch.bool)
    kept[torch.tensor(removed, dtype=torch.int64, device=everything.device)] = False
    return everything[kept]
