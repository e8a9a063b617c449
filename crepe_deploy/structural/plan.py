"""What a structurally pruned layer keeps: KV groups, query heads, FFN neurons, and the refit output projections.

Head `h` of the source attends with the keys and values of group `h // Q`, Q query heads in each group. Kept heads are
ordered group by group, so that the smaller layer is an ordinary grouped attention again, with fewer groups or fewer
query heads in each of them. Head size and hidden size never change.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError, UnsupportedModel
from crepe_deploy.model.structure import Structure

from .layout import structure_of


@dataclass(frozen=True)
class Geometry:
    """The sizes of a decoder whose layers are alike.

    hidden, head_dim, intermediate: features. heads: query heads. kv_heads: KV groups. layers: decoder blocks.
    qkv_bias, mlp_bias: whether q/k/v and gate/up have biases, which shrink with their rows. The biases of o and down
    have `hidden` entries whatever is kept, and count nowhere here. structure: where heads and neurons are.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    layers: int
    qkv_bias: bool = False
    mlp_bias: bool = False
    structure: Structure = field(default_factory=Structure)

    def __post_init__(self) -> None:
        for name in ("hidden", "heads", "kv_heads", "head_dim", "intermediate", "layers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"a model with {name} = {getattr(self, name)} has nothing to prune")
        if self.heads % self.kv_heads:
            raise UnsupportedModel(f"{self.heads} query heads do not divide into {self.kv_heads} KV groups")

    @classmethod
    def from_config(cls, config: Any) -> Geometry:
        """Read a transformers configuration. Raises UnsupportedModel naming what it lacks."""
        kind = getattr(config, "model_type", "unknown")
        for name in ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers"):
            if not isinstance(getattr(config, name, None), int):
                raise UnsupportedModel(f"model type '{kind}': its configuration has no single '{name}'")
        heads, structure = config.num_attention_heads, structure_of(kind)
        return cls(
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            intermediate=config.intermediate_size,
            layers=config.num_hidden_layers,
            qkv_bias=structure.has_qkv_bias(config),
            mlp_bias=structure.has_mlp_bias(config),
            structure=structure,
        )

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one KV group."""
        return self.heads // self.kv_heads

    @property
    def query_head_parameters(self) -> int:
        """Parameters that go with one query head: its q rows and their biases, its o columns."""
        return self.head_dim * (2 * self.hidden + self.qkv_bias)

    @property
    def key_value_parameters(self) -> int:
        """Parameters that go with the keys and values of one group: its k and v rows and their biases."""
        return 2 * self.head_dim * (self.hidden + self.qkv_bias)

    @property
    def neuron_parameters(self) -> int:
        """Parameters that go with one FFN neuron: its gate and up rows and their biases, its down column."""
        return 3 * self.hidden + 2 * self.mlp_bias

    def group_parameters(self, queries: int | None = None) -> int:
        """Parameters that go with one KV group that has `queries` query heads, all of them by default."""
        kept = self.queries_per_group if queries is None else queries
        return self.key_value_parameters + kept * self.query_head_parameters

    def layer_parameters(self, groups: int, queries: int, neurons: int) -> int:
        """Prunable parameters of a layer of `groups` KV groups with `queries` query heads each, and `neurons`."""
        return groups * self.group_parameters(queries) + neurons * self.neuron_parameters

    @property
    def parameters(self) -> int:
        """Prunable parameters of the whole model: every layer's attention and FFN, without norms and embeddings."""
        return self.layers * self.layer_parameters(self.kv_heads, self.queries_per_group, self.intermediate)


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """What one layer keeps.

    groups: kept KV groups of the source layer, ascending, at least one. queries: for each kept group the kept query
    heads within it (0 to Q - 1), ascending, equally many in every group. neurons: kept FFN neurons, ascending, at
    least one. o_proj: (hidden, kept query heads * head_dim), the refit weight, columns in kept order, group by group.
    down_proj: (hidden, len(neurons)), the refit weight. tuned: what repair made of the layer's tensors once narrow, by
    name in it; they go before the source's and the refit ones. Raises ConfigError for what no attention or FFN can be.
    """

    groups: tuple[int, ...]
    queries: tuple[tuple[int, ...], ...]
    neurons: tuple[int, ...]
    o_proj: Tensor
    down_proj: Tensor
    tuned: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ascending("groups", self.groups)
        _ascending("neurons", self.neurons)
        if len(self.queries) != len(self.groups):
            raise ConfigError(f"{len(self.groups)} KV groups are kept, with query heads for {len(self.queries)}")
        for group, kept in zip(self.groups, self.queries, strict=True):
            _ascending(f"query heads of group {group}", kept)
        if len({len(kept) for kept in self.queries}) > 1:
            counts = ", ".join(str(len(kept)) for kept in self.queries)
            raise ConfigError(f"kept KV groups have {counts} query heads; every group needs equally many")
        if self.o_proj.ndim != 2 or self.down_proj.ndim != 2:
            raise ConfigError("o_proj and down_proj are matrices (hidden, kept columns)")
        if self.o_proj.shape[0] != self.down_proj.shape[0]:
            raise ConfigError(f"o_proj has {self.o_proj.shape[0]} rows and down_proj {self.down_proj.shape[0]}")
        if self.o_proj.shape[1] % self.heads:
            raise ConfigError(f"o_proj has {self.o_proj.shape[1]} columns for {self.heads} kept query heads")
        if self.down_proj.shape[1] != self.intermediate_size:
            raise ConfigError(f"down_proj has {self.down_proj.shape[1]} columns for {len(self.neurons)} kept neurons")

    @property
    def heads(self) -> int:
        """Kept query heads of the layer."""
        return sum(len(kept) for kept in self.queries)

    @property
    def kv_heads(self) -> int:
        """Kept KV groups of the layer."""
        return len(self.groups)

    @property
    def intermediate_size(self) -> int:
        """Kept FFN neurons of the layer."""
        return len(self.neurons)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Query heads, KV groups, FFN neurons."""
        return self.heads, self.kv_heads, self.intermediate_size

    def parameters(self, geometry: Geometry) -> int:
        """Prunable parameters that stay in this layer."""
        return geometry.layer_parameters(self.kv_heads, len(self.queries[0]), self.intermediate_size)

    def check(self, geometry: Geometry) -> None:
        """Raise ConfigError where the plan asks for something that a layer of this geometry does not have."""
        for what, kept, count in (
            ("KV group", self.groups, geometry.kv_heads),
            ("query head within its group", tuple(kept[-1] for kept in self.queries), geometry.queries_per_group),
            ("FFN neuron", self.neurons, geometry.intermediate),
        ):
            if max(kept) >= count:
                raise ConfigError(f"{what} {max(kept)} is kept, and the layer has {count}, counted from 0")
        shape = (geometry.hidden, self.heads * geometry.head_dim)
        if tuple(self.o_proj.shape) != shape:
            raise ConfigError(f"o_proj has shape {tuple(self.o_proj.shape)}; the kept heads need {shape}")
        if self.down_proj.shape[0] != geometry.hidden:
            raise ConfigError(f"down_proj has {self.down_proj.shape[0]} rows; the hidden size is {geometry.hidden}")

    def kept_heads(self, geometry: Geometry) -> tuple[int, ...]:
        """The source's query heads that stay, in kept order."""
        size = geometry.queries_per_group
        return tuple(
            group * size + query for group, kept in zip(self.groups, self.queries, strict=True) for query in kept
        )

    def query_features(self, geometry: Geometry) -> Tensor:
        """Rows of q and columns of o that stay, in kept order: int64 (kept query heads * head_dim,)."""
        return head_features(self.kept_heads(geometry), geometry.head_dim)

    def key_value_features(self, geometry: Geometry) -> Tensor:
        """Rows of k and v that stay, in kept order: int64 (kept groups * head_dim,)."""
        return head_features(self.groups, geometry.head_dim)


class Plans(Protocol):
    """One plan for each layer, by index; a list is one, and so is what reads each from disk when it is asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> LayerPlan: ...


def head_features(heads: Sequence[int], head_dim: int) -> Tensor:
    """The features of `heads`, each `head_dim` long, in the order given: int64 (len(heads) * head_dim,)."""
    starts = torch.tensor(heads, dtype=torch.int64).unsqueeze(1) * head_dim
    return (starts + torch.arange(head_dim)).flatten()


def _ascending(what: str, kept: tuple[int, ...]) -> None:
    if not kept:
        raise ConfigError(f"{what}: none is kept; at least one is needed")
    if kept[0] < 0 or any(later <= earlier for earlier, later in itertools.pairwise(kept)):
        raise ConfigError(f"{what}: indices must ascend from 0 without repeats")
