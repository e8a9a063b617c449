"""What structural pruning counts in: attention units and FFN units of each layer, and a budget of real parameters.

An attention unit is a whole KV group with its query heads ("groups"), or one query head of every group ("queries");
both leave an ordinary grouped attention. An FFN unit is `multiple` neurons. All units of a kind have the same number of
parameters, keys and values included, so moving one from a layer to another changes nothing in the total.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from crepe_deploy.errors import ConfigError

from .plan import Geometry

AttentionUnit = Literal["groups", "queries"]
FIRST_STEP = Fraction(1, 8)
MOST_SPLITS = 6
REACH = 4
SHARE_DIGITS = 10**6


@dataclass(frozen=True, order=True)
class Width:
    """What one layer keeps, in numbers: KV groups, query heads in each of them, FFN neurons."""

    groups: int
    queries: int
    neurons: int


@dataclass(frozen=True)
class Allocation:
    """Attention units and FFN units that every layer keeps, one number for each layer."""

    attention: tuple[int, ...]
    neurons: tuple[int, ...]


@dataclass(frozen=True)
class Units:
    """The units of a model. multiple: neurons in an FFN unit. Raises ConfigError where it does not divide a layer."""

    geometry: Geometry
    multiple: int
    attention: AttentionUnit

    def __post_init__(self) -> None:
        size = self.geometry.intermediate
        if self.multiple < 1 or size % self.multiple:
            near = sorted((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - self.multiple))[:3]
            raise ConfigError(
                f"--ffn-multiple {self.multiple} does not divide the {size} FFN neurons of a layer; "
                f"divisors near it: {', '.join(str(divisor) for divisor in sorted(near))}"
            )

    @property
    def attention_count(self) -> int:
        """Attention units of a dense layer."""
        return self.geometry.kv_heads if self.attention == "groups" else self.geometry.queries_per_group

    @property
    def neuron_count(self) -> int:
        """FFN units of a dense layer."""
        return self.geometry.intermediate // self.multiple

    def attention_share(self, budget: Budget) -> float:
        """The share of attention units that a budget keeps, rounded up so that `plan_budget` gives the budget back."""
        whole = self.geometry.layers * self.attention_count
        return math.ceil(Fraction(budget.attention, whole) * SHARE_DIGITS) / SHARE_DIGITS

    @property
    def attention_parameters(self) -> int:
        """Parameters of one attention unit."""
        if self.attention == "groups":
            return self.geometry.group_parameters()
        return self.geometry.kv_heads * self.geometry.query_head_parameters

    @property
    def neuron_parameters(self) -> int:
        """Parameters of one FFN unit."""
        return self.multiple * self.geometry.neuron_parameters

    @property
    def fixed_parameters(self) -> int:
        """Parameters of all layers that no unit holds: keys and values, where only query heads are pruned."""
        geometry = self.geometry
        return 0 if self.attention == "groups" else geometry.layers * geometry.kv_heads * geometry.key_value_parameters

    def attention_level(self, units: int) -> tuple[int, int]:
        """(KV groups, query heads in each) of a layer that keeps `units` attention units."""
        whole = self.geometry.queries_per_group
        return (units, whole) if self.attention == "groups" else (self.geometry.kv_heads, units)

    def width(self, attention: int, neurons: int) -> Width:
        """The width of a layer that keeps so many units."""
        return Width(*self.attention_level(attention), neurons * self.multiple)

    def widths(self, allocation: Allocation) -> tuple[Width, ...]:
        """The width of every layer."""
        return tuple(self.width(*kept) for kept in zip(allocation.attention, allocation.neurons, strict=True))


@dataclass(frozen=True)
class Budget:
    """How many units of each kind the whole model may keep. dense, target, kept: prunable parameters."""

    dense: int
    target: int
    kept: int
    attention: int
    neurons: int


def target_parameters(geometry: Geometry, sparsity: float) -> int:
    """The most parameters that may stay: dense less `sparsity` of it, rounded down. Raises ConfigError."""
    if not 0 < sparsity < 1:
        raise ConfigError(f"--sparsity {sparsity}: the fraction to remove lies between 0 and 1, neither included")
    return geometry.parameters - math.ceil(geometry.parameters * Fraction(str(sparsity)))


def plan_budget(units: Units, sparsity: float, attention_share: float | Fraction | None = None) -> Budget:
    """Hold attention units at `attention_share` of all, by default the target's share; the FFN takes what they leave.

    The total is at most the target, and no unit that was removed would still fit below it. Raises ConfigError naming
    the largest sparsity that leaves one unit of each kind in every layer.
    """
    geometry, layers = units.geometry, units.geometry.layers
    target = target_parameters(geometry, sparsity)
    room = target - units.fixed_parameters
    per_attention, per_neurons = units.attention_parameters, units.neuron_parameters
    least = layers * (per_attention + per_neurons)
    if room < least:
        limit = 1 - (least + units.fixed_parameters) / geometry.parameters
        raise ConfigError(
            f"--sparsity {sparsity} leaves {target} parameters, fewer than one attention unit and one FFN unit in "
            f"every layer; at most {math.floor(limit * 1000) / 1000} is possible with these units"
        )
    if attention_share is not None and not 0 < attention_share <= 1:
        raise ConfigError(f"--attention-share {attention_share}: the share of attention units to keep lies in (0, 1]")
    wanted = Fraction(target, geometry.parameters) if attention_share is None else Fraction(str(attention_share))
    share = math.floor(layers * units.attention_count * wanted)
    enough = (room - (layers * units.neuron_count + 1) * per_neurons) // per_attention + 1  # the FFN fills the rest
    most = min(layers * units.attention_count, (room - layers * per_neurons) // per_attention)
    attention = max(layers, min(most, max(share, enough)))
    neurons = min(layers * units.neuron_count, (room - attention * per_attention) // per_neurons)
    spare = room - attention * per_attention - neurons * per_neurons
    attention = min(layers * units.attention_count, attention + spare // per_attention)
    kept = units.fixed_parameters + attention * per_attention + neurons * per_neurons
    return Budget(geometry.parameters, target, kept, attention, neurons)


def split_budgets(units: Units, sparsity: float) -> list[Budget]:
    """The splits between attention and FFN that are judged before a search, fewest attention units first.

    They are the target's share for both, and every number of attention units that all layers can keep, of which evenly
    chosen ones where there are more than `MOST_SPLITS` in all. Raises ConfigError like `plan_budget`.
    """
    own, count = plan_budget(units, sparsity), units.attention_count
    whole = {plan_budget(units, sparsity, Fraction(kept, count)) for kept in range(1, count + 1)} - {own}
    others = sorted(whole, key=lambda budget: budget.attention)
    if len(others) >= MOST_SPLITS:
        last = MOST_SPLITS - 2
        others = [others[place * (len(others) - 1) // last] for place in range(last + 1)]
    return sorted([own, *others], key=lambda budget: budget.attention)


def spread(total: int, layers: int) -> tuple[int, ...]:
    """`total` units over the layers as evenly as whole numbers allow, the larger ones at even distances."""
    base, rest = divmod(total, layers)
    return tuple(base + ((index + 1) * rest // layers > index * rest // layers) for index in range(layers))


def even(units: Units, budget: Budget) -> Allocation:
    """The budget spread evenly: where the search starts, and the uniform baseline."""
    layers = units.geometry.layers
    return Allocation(spread(budget.attention, layers), spread(budget.neurons, layers))


def step_units(count: int, iteration: int) -> int:
    """Units between two levels in an iteration from 0: 12.5 %, halved by each iteration, rounded, at least one."""
    return max(1, math.floor(count * FIRST_STEP * Fraction(1, 2**iteration) + Fraction(1, 2)))


def levels(centre: int, step: int, count: int) -> tuple[int, ...]:
    """The levels of one module, ascending: the centre and up to four steps to either side, within 1 and `count`."""
    return tuple(
        level for k in range(-REACH, REACH + 1) if 1 <= (level := centre + k * step) <= count
    )  # fmt: skip


def parameters(geometry: Geometry, widths: Sequence[Width]) -> int:
    """Prunable parameters that stay in layers of these widths."""
    return sum(geometry.layer_parameters(width.groups, width.queries, width.neurons) for width in widths)


def splits(geometry: Geometry, multiple: int, sparsity: float) -> list[Width]:
    """Every width that all layers can share at this sparsity: for each attention, as many FFN units as fit.

    Each is at most the target, and less than one FFN unit a layer below it. Raises ConfigError where there is none.
    """
    units = Units(geometry, multiple, "groups")
    room = target_parameters(geometry, sparsity) // geometry.layers
    shared = []
    for groups in range(1, geometry.kv_heads + 1):
        for queries in range(1, geometry.queries_per_group + 1):
            left = room - groups * geometry.group_parameters(queries)
            neurons = left // units.neuron_parameters
            if 1 <= neurons <= units.neuron_count:
                shared.append(Width(groups, queries, neurons * multiple))
    if not shared:
        raise ConfigError(
            f"--sparsity {sparsity} with --ffn-multiple {multiple} leaves no width that all layers can share: "
            f"{room} parameters for each layer; give a smaller --sparsity or --ffn-multiple"
        )
    return shared


def proportional(geometry: Geometry, shared: Sequence[Width]) -> Width:
    """The split that prunes attention and FFN most alike; of equals the one with more KV groups."""
    dense = geometry.kv_heads * geometry.group_parameters()

    def imbalance(width: Width) -> tuple[float, int]:
        attention = width.groups * geometry.group_parameters(width.queries) / dense
        return abs(attention - width.neurons / geometry.intermediate), -width.groups

    return min(shared, key=imbalance)
