"""Building a supernet block by block: what every level of every layer is, behind what the levels before it become."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from crepe_deploy.model.calibrate import Collector, embed
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.model.paired import Pair
from crepe_deploy.model.stats import Stats
from crepe_deploy.progress import Meter
from crepe_deploy.pruning.methods.numbers import naming

from .accumulate import level_shares, mean_weight
from .levels import Level, LocalRules, attention_levels, neuron_levels
from .narrow import output_specs
from .plan import Geometry
from .supernet import LayerLevels, Store

Say = Callable[[str], None]


@dataclass(frozen=True)
class Builder:
    """What is the same for every supernet of a run. tokens: int64 (samples, length), the calibration text.

    tick: called after every block.
    """

    decoder: Decoder
    geometry: Geometry
    tokens: Tensor
    rules: LocalRules
    say: Say
    tick: Meter

    def build(self, wanted: Sequence[LayerLevels], store: Store, accumulation: str) -> None:
        """Build the levels that `store` lacks; the block after next is fed the mean that `accumulation` names.

        Inputs of `o_proj` and `down_proj` come from one pass, both behind the mean of the blocks before. Whole layers
        are read, so an interrupted build goes on to the same result. Raises NumericalError, DiskFullError.
        """
        (stream,) = embed(self.decoder, [self.tokens])
        for index, layer in enumerate(wanted):
            specs = output_specs(self.decoder, index)
            with self.decoder.block(index) as (block, weights):
                if lacks := self._lacks(store, index, layer):
                    collector = Collector(self.rules.needs)
                    if self.rules.needs:
                        with collector.watching(block, specs):
                            stream.run(block, index, advance=False)
                    stats = [collector.stats(spec, stream.sequences) for spec in specs]
                    self._write(store, index, layer, [weights[spec.key] for spec in specs], stats)
                if self.rules.needs and index < len(wanted) - 1:
                    if accumulation != "none":
                        _put_means(block, specs, layer, store, index, accumulation)
                    stream.run(block, index, advance=True)
            (self.tick if lacks else self.tick.before)()

    def build_paired(self, wanted: Sequence[LayerLevels], store: Store) -> None:
        """Build one level of every layer behind exactly what was pruned before it, aiming at the dense model's output.

        `o_proj` is pruned before the inputs of `down_proj` are looked at; what the residual stream has lost is made
        up for, as with `--feed both --reconstruct`. wanted: one level each.
        """
        (stream,) = embed(self.decoder, [self.tokens])
        pair = Pair.start(stream, self.decoder.config)
        for index, layer in enumerate(wanted):
            specs = output_specs(self.decoder, index)
            with self.decoder.block(index) as (block, weights):
                before = copy.deepcopy(block)
                if lacks := self._lacks(store, index, layer):
                    attention, ffn = (weights[spec.key].clone() for spec in specs)
                    kept = self._attention(attention, pair.stats(before, block, index, specs[:1]), layer, index)
                    _put(block, specs[0], kept[layer.attention_centre].full(specs[0].in_features))
                    stats = pair.stats(before, block, index, specs[1:])
                    store.write(index, kept, self._neurons(ffn, stats, layer, index))
                _put_means(block, specs, layer, store, index, "single")
                if index < len(wanted) - 1:
                    pair.advance(before, block, index)
            (self.tick if lacks else self.tick.before)()

    def _lacks(self, store: Store, index: int, layer: LayerLevels) -> bool:
        damage = store.damage(index, layer)
        if damage is not None and store.layer(index).is_dir():
            self.say(f"{damage}: building it again")
        return damage is not None

    def _write(self, store: Store, index: int, layer: LayerLevels, weights: list[Tensor], stats: list[Stats]) -> None:
        attention = self._attention(weights[0], stats[0], layer, index)
        store.write(index, attention, self._neurons(weights[1], stats[1], layer, index))

    def _attention(self, weight: Tensor, stats: Stats, layer: LayerLevels, index: int) -> dict[tuple[int, int], Level]:
        with naming(f"the output projection of layer {index}'s attention"):
            return attention_levels(weight, stats, layer.attention, self.geometry, self.rules, salt=2 * index)

    def _neurons(self, weight: Tensor, stats: Stats, layer: LayerLevels, index: int) -> dict[int, Level]:
        with naming(f"the output projection of layer {index}'s FFN"):
            return neuron_levels(weight, stats, layer.neurons, self.rules, salt=2 * index + 1)


def _put_means(
    block: nn.Module, specs: list[LinearSpec], layer: LayerLevels, store: Store, index: int, accumulation: str
) -> None:
    """Write W_bar of both projections into the block, from the levels as they are stored."""
    attention = [store.attention(index, size) for size in layer.attention]
    neurons = [store.neurons(index, size) for size in layer.neurons]
    centres = layer.attention.index(layer.attention_centre), layer.neurons.index(layer.neuron_centre)
    for spec, levels, centre in zip(specs, (attention, neurons), centres, strict=True):
        shares = level_shares([len(level.columns) for level in levels], centre, accumulation)
        _put(block, spec, mean_weight(levels, shares, spec.in_features))


def _put(block: nn.Module, spec: LinearSpec, weight: Tensor) -> None:
    block.get_submodule(spec.path).get_parameter("weight").data.copy_(weight)
