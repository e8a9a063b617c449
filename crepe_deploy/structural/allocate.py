"""How many units each layer keeps without a search: evenly, or by FLAP's standardised scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crepe_deploy.model.calibrate import Collector, embed
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.progress import Progress, silent

from .levels import flap
from .narrow import output_specs
from .units import Allocation, Budget, Units


def flap_scores(decoder: Decoder, tokens: Tensor, step: Progress = silent) -> list[tuple[Tensor, Tensor]]:
    """FLAP's score of every channel of `o_proj` and `down_proj`, (in,) fp64, layer by layer, on the dense model."""
    (stream,) = embed(decoder, [tokens])
    scores = []
    for index in range(len(decoder.blocks)):
        specs = output_specs(decoder, index)
        collector = Collector(frozenset({"moments"}))
        with decoder.block(index) as (block, weights):
            with collector.watching(block, specs):
                stream.run(block, index, advance=True)
            stats = [collector.stats(spec, stream.sequences) for spec in specs]
            attention, neurons = (
                flap(weights[spec.key], moments).cpu() for spec, moments in zip(specs, stats, strict=True)
            )
        scores.append((attention.cpu(), neurons.cpu()))
        step(index + 1, len(decoder.blocks))
    return scores


def flap_allocation(scores: Sequence[tuple[Tensor, Tensor]], units: Units, budget: Budget) -> Allocation:
    """Units of each layer when the best of all layers stay, within the budget of each kind and at least one a layer.

    Scores are standardised within their projection, as in FLAP's AL-AM; a unit is worth the mean of its channels, an
    FFN unit being the next best `multiple` neurons. FLAP ranks attention and FFN together; here each has its budget,
    so that every method keeps the same number of parameters.
    """
    attention = [_attention_worth(standardised(first), units) for first, _ in scores]
    neurons = [
        standardised(second).sort(descending=True).values.view(-1, units.multiple).mean(1) for _, second in scores
    ]
    return Allocation(best(attention, budget.attention), best(neurons, budget.neurons))


def standardised(scores: Tensor) -> Tensor:
    """Scores (n,) less their mean, over their standard deviation; zeros where they are all alike."""
    spread = scores.std(correction=0)
    return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)


def _attention_worth(scores: Tensor, units: Units) -> Tensor:
    geometry = units.geometry
    heads = scores.view(geometry.kv_heads, geometry.queries_per_group, geometry.head_dim).mean(2)
    if units.attention == "groups":
        return heads.mean(1).sort(descending=True).values
    return heads.sort(dim=1, descending=True).values.mean(0)


def best(worth: Sequence[Tensor], total: int) -> tuple[int, ...]:
    """How many units each layer keeps of the `total` best; worth: (units,) descending for each layer.

    Every layer keeps its first unit. Equal worth goes to the earlier layer.
    """
    rest = sorted(
        (-float(value), layer, place)
        for layer, values in enumerate(worth)
        for place, value in enumerate(values)
        if place > 0
    )
    kept = [1] * len(worth)
    for _, layer, _ in rest[: total - len(worth)]:
        kept[layer] += 1
    return tuple(kept)
