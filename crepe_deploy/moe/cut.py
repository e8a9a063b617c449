"""What becomes of a checkpoint's tensors and configuration when experts of each layer go: rows and names."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crepe_deploy.model.blocks import expert_layer
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.experts import COUNTS, Experts
from crepe_deploy.store.writing import Planned


@dataclass(frozen=True)
class Cut:
    """names: of tensors that are written under another name, or not at all (None). rows: of tensors with a row for
    each expert, those that stay."""

    names: Mapping[str, str | None]
    rows: Mapping[str, Tensor]

    def plan(self, decoder: Decoder) -> dict[str, Planned]:
        """What is written, in the order and the shards of the source."""
        planned = {}
        for info in decoder.reader:
            name, rows = self.names.get(info.name, info.name), self.rows.get(info.name)
            shape = info.shape if rows is None else (len(rows), *info.shape[1:])
            if name is not None:
                planned[name] = Planned(info.file.name, info.dtype, shape)
        return planned

    def applied(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the source as it is written."""
        rows = self.rows.get(name)
        return tensor if rows is None else tensor.index_select(0, rows)


def cut_of(decoder: Decoder, kept: Mapping[int, list[int]]) -> Cut:
    """kept: for each layer with experts, those that stay, in ascending order."""
    names: dict[str, str | None] = {}
    rows: dict[str, Tensor] = {}
    assert decoder.experts is not None
    for index, stay in kept.items():
        prefix, wanted = f"{decoder.blocks_path}.{index}.", torch.tensor(stay)
        for leaf in decoder.experts.per_expert:
            rows[decoder.key(f"{prefix}{decoder.experts.router}.{leaf}")] = wanted
        experts = decoder.blocks[index].get_submodule(decoder.experts.module)
        for leaf, parameter in experts.named_parameters():
            pieces = decoder.pieces(f"{prefix}{decoder.experts.module}.{leaf}", tuple(parameter.shape))
            if pieces[0].expert is None:
                rows[pieces[0].key] = wanted
                continue
            keys = {(piece.expert, piece.first_row): piece.key for piece in pieces}
            places = {old: new for new, old in enumerate(stay)}
            for (expert, row), key in keys.items():
                names[key] = keys[places[expert], row] if expert in places else None
    return Cut(names, rows)


def cut_content(content: Mapping[str, Any], config: Any, count: int) -> dict[str, Any]:
    """config.json with `count` experts in each layer, in the spellings that it has; config: what was read from it."""
    spelled = [name for name in COUNTS if name in content] or [next(name for name in COUNTS if hasattr(config, name))]
    return {**content, **dict.fromkeys(spelled, count)}


@contextlib.contextmanager
def masked(block: nn.Module, experts: Experts, stay: list[int]) -> Iterator[None]:
    """Inside, the router of a block with all its weights in memory knows only the experts that stay."""
    layer = expert_layer(block, experts)
    assert layer is not None
    router, wanted = layer[0], torch.tensor(stay)
    small: Any = copy.deepcopy(router)
    for leaf in experts.per_expert:
        held = small._parameters if leaf in small._parameters else small._buffers
        narrow = held[leaf].index_select(0, wanted)
        held[leaf] = nn.Parameter(narrow, requires_grad=False) if held is small._parameters else narrow
    small.num_experts = len(stay)

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, chosen = small(hidden)
        return logits, weights, wanted[chosen]

    router.forward = forward
    try:
        yield
    finally:
        del router.forward
