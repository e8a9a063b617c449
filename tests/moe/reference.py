"""Slow references: routing and its statistics one token and one expert at a time."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from crepe_deploy.moe.measure import LayerStats


def without(router: nn.Module, gone: list[int], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and experts that a router chooses with minus infinity as the logits of those that are gone."""
    linear = torch.nn.functional.linear

    def masked(*args: Any) -> Tensor:
        return linear(*args).index_fill(-1, torch.tensor(gone, dtype=torch.long), -torch.inf)

    bias: Any = dict(router.named_buffers()).get("e_score_correction_bias")
    with mock.patch.object(torch.nn.functional, "linear", masked):
        if bias is None:
            _, weights, chosen = router(hidden)
        else:  # it is added behind the sigmoid of a logit
            before = bias.clone()
            bias[gone] = -torch.inf
            _, weights, chosen = router(hidden)
            bias.copy_(before)
    return weights, chosen


def output(experts: nn.Module, hidden: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return experts(hidden, chosen, weights)  # type: ignore[no-any-return]


def statistics(router: nn.Module, experts: Any, hidden: Tensor) -> LayerStats:
    """The same as a `Meter` adds up, with the router run anew for every expert that is gone."""
    count = len(experts.down_proj)
    _, weights, chosen = router(hidden)
    stats = LayerStats.zeros(count)
    for token in range(len(hidden)):
        row = hidden[token : token + 1]
        whole = output(experts, row, weights[token : token + 1], chosen[token : token + 1])
        changes = {}
        for place, expert in enumerate(chosen[token].tolist()):
            alone = output(experts, row, torch.ones(1, 1), torch.tensor([[expert]]))
            stats.tokens[expert] += 1
            stats.weights[expert] += weights[token, place]
            stats.reap[expert] += weights[token, place] * alone.norm()
            changes[expert] = (output(experts, row, *without(router, [expert], row)) - whole).double().flatten()
        for one, first in changes.items():
            for other, second in changes.items():
                stats.gram[one, other] += first @ second
    return stats


def neurons(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    """What the last matrix of one expert reads, by its family's formula."""
    first = experts.gate_up_proj[expert].detach()
    if hasattr(experts, "gate_up_proj_bias"):
        return experts._apply_gate(hidden @ first + experts.gate_up_proj_bias[expert]).detach()  # type: ignore[no-any-return]
    gate, up = (hidden @ first.T).chunk(2, dim=-1)
    return experts.act_fn(gate) * up  # type: ignore[no-any-return]
