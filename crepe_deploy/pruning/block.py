"""Pruning one block that is in memory: collect what its layers read, prune them, and send the hidden states on."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor, nn

from crepe_deploy.model.blocks import expert_layer
from crepe_deploy.model.calibrate import Collector, Stream, embed
from crepe_deploy.model.decoder import LinearSpec
from crepe_deploy.model.inside import Routed
from crepe_deploy.model.paired import Pair
from crepe_deploy.model.stats import Stats
from crepe_deploy.phases import Phases

from .layer import LayerPruner, LayerResult
from .metering import RunMeter
from .records import ROUTED
from .run_plan import RunPlan
from .steps.repair import Lessons, Repaired, tunable


@dataclass(frozen=True)
class Streams:
    """The hidden states that walk through the blocks of one run; each block sends them on.

    probe: the proof's tokens, through the pruned blocks. calibration: what statistics are taken from, or None.
    pairs: with the feed "both" that calibration beside its dense twin, and behind it the held-out windows, if any.
    """

    probe: Stream
    calibration: Stream | None
    pairs: list[Pair]


@dataclass(frozen=True)
class BlockResult:
    """What was done to each layer by tensor name and to the block as a whole, and the seconds that it took by phase."""

    layers: dict[str, LayerResult]
    repaired: Repaired | None
    seconds: dict[str, float]


def start_streams(plan: RunPlan) -> Streams:
    """All tokens of the run in front of the first block, from one read of the embeddings."""
    token_sets = [tokens for tokens in (plan.probe, plan.calibration, plan.held) if tokens is not None]
    probe, *rest = embed(plan.decoder, token_sets)
    both = plan.config.feed == "both"
    pairs = [Pair.start(stream, plan.decoder.config) for stream in rest] if both else []
    return Streams(probe, rest[0] if rest else None, pairs)


def prune_block(
    plan: RunPlan, index: int, streams: Streams, weights: dict[str, Tensor], meter: RunMeter
) -> BlockResult:
    """Prune the targets of block `index`, with its tensors `weights` by checkpoint name, in place.

    `streams` follow; `meter` is told of what is done.
    """
    phases = Phases()
    pruner = LayerPruner(plan.decoder, plan.config, plan.patterns, phases)
    repaired = None
    if streams.pairs:
        layers, repaired = _beside_dense(plan, index, streams, weights, pruner, meter)
    else:
        layers = _alone(plan, index, streams, weights, pruner, meter)
    with phases("forward"):
        send_pruned(plan, index, streams)
    return BlockResult(layers, repaired, phases.seconds)


def send_dense(plan: RunPlan, index: int, streams: Streams) -> None:
    """Send what walks through the dense blocks on, while block `index` is as it was."""
    block = plan.decoder.blocks[index]
    if streams.calibration is not None and plan.config.feed == "dense":
        streams.calibration.run(block, index, advance=True)
    _send_dense_sides(plan, index, streams, block)


def _send_dense_sides(plan: RunPlan, index: int, streams: Streams, dense: nn.Module) -> None:
    last = index == len(plan.targets) - 1
    # Behind the last block only what the held-out windows give there is read, and by repair what is wanted.
    for pair in streams.pairs[1:] if last and plan.config.steps.repair is None else streams.pairs:
        pair.dense.advance(dense, index)


def send_pruned(plan: RunPlan, index: int, streams: Streams) -> None:
    """Send what walks through the pruned blocks on, once block `index` is pruned."""
    block, last = plan.decoder.blocks[index], index == len(plan.targets) - 1
    for pair in streams.pairs[1:] if last else streams.pairs:
        pair.pruned.advance(block, index)
    if streams.calibration is not None and plan.config.feed == "pruned" and not last:
        streams.calibration.run(block, index, advance=True)
    streams.probe.run(block, index, advance=True)


def _alone(
    plan: RunPlan, index: int, streams: Streams, weights: dict[str, Tensor], pruner: LayerPruner, meter: RunMeter
) -> dict[str, LayerResult]:
    """Statistics from one pass through the dense block; the next block is fed by it or by the pruned one."""
    block, targets, stream = plan.decoder.blocks[index], plan.targets[index], streams.calibration
    linears, inside = ([spec for spec in targets if (spec.expert is None) is alone] for alone in (True, False))
    collector, routed = Collector(plan.config.needs), None
    if stream is not None:
        with pruner.phases("forward"), collector.watching(block, linears), contextlib.ExitStack() as stack:
            if inside and plan.config.needs:
                routed = Routed(plan.config.needs, stream.hidden[0].device)
                stack.enter_context(routed.watching(_experts(plan, block)))
            stream.run(block, index, advance=plan.config.feed == "dense", tick=meter.statistics(index, targets))
    layers = {}
    for spec in linears:
        stats = Stats() if stream is None else collector.stats(spec, stream.sequences)
        layers[spec.key] = pruner.prune(block, spec, weights, stats)
        meter.layer(spec)
    sequences = 0 if stream is None else stream.sequences
    return layers | _inside(plan, block, inside, routed, sequences, weights, pruner, meter)


def _experts(plan: RunPlan, block: nn.Module) -> nn.Module:
    """The experts of a block that has some."""
    assert plan.decoder.experts is not None
    layer = expert_layer(block, plan.decoder.experts)
    assert layer is not None
    return layer[1]


def _inside(
    plan: RunPlan,
    block: nn.Module,
    inside: list[LinearSpec],
    routed: Routed | None,
    sequences: int,
    weights: dict[str, Tensor],
    pruner: LayerPruner,
    meter: RunMeter,
) -> dict[str, LayerResult]:
    """The matrices of experts, one expert's after the other's; its statistics are gone before the next one's come."""
    layers: dict[str, LayerResult] = {}
    for expert, specs in groupby(inside, key=lambda spec: spec.expert):
        read = None
        if routed is not None and expert is not None:
            with pruner.phases("forward"):
                read = routed.of(expert, _experts(plan, block))
        for spec in specs:
            result = pruner.prune(block, spec, weights, Stats() if read is None else read.stats(spec, sequences))
            if read is not None:
                result = replace(result, notes=result.notes | {ROUTED: float(read.tokens)})
            layers[spec.key] = result
            meter.layer(spec)
    return layers


def _beside_dense(
    plan: RunPlan, index: int, streams: Streams, weights: dict[str, Tensor], pruner: LayerPruner, meter: RunMeter
) -> tuple[dict[str, LayerResult], Repaired | None]:
    """Group by group, each behind what is pruned already and beside what the dense block has there; then as a whole."""
    block, targets, pairs = plan.decoder.blocks[index], plan.targets[index], streams.pairs
    repair, repaired = plan.config.steps.repair, None
    dense = copy.deepcopy(block)
    layers: dict[str, LayerResult] = {}
    for group in pairs[0].groups(block, index, plan.decoder.linears[index], targets):
        layers |= _group(pairs[0], dense, block, index, group, weights, pruner, meter)
    with pruner.phases("forward"):
        _send_dense_sides(plan, index, streams, dense)
    if repair is not None and targets:
        with pruner.phases("repair"):
            learnt, held = (
                Lessons(pair.pruned.stream, pair.dense.stream, index, plan.decoder.device) for pair in pairs
            )
            repaired = repair(block, _tuned(plan, index, weights), learnt, held, meter.repair(index))
            for pair in pairs:
                pair.pruned.outputs = []  # what its parts put out before
    return layers, repaired


def _tuned(plan: RunPlan, index: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What repair may change, by name in the block: the weights of its targets, and its norms."""
    block, prefix = plan.decoder.blocks[index], f"{plan.decoder.blocks_path}.{index}."
    pruned, linear = ([spec.path for spec in specs[index]] for specs in (plan.targets, plan.decoder.linears))
    return {name: weights[plan.decoder.key(prefix + name)] for name in tunable(block, pruned, linear)}


def _group(
    pair: Pair,
    dense: nn.Module,
    block: nn.Module,
    index: int,
    group: list[LinearSpec],
    weights: dict[str, Tensor],
    pruner: LayerPruner,
    meter: RunMeter,
) -> dict[str, LayerResult]:
    """The layers that share one input; their statistics are gone before the next group's are taken."""
    with pruner.phases("forward"):
        stats = pair.stats(dense, block, index, group, meter.statistics(index, group))
    layers = {}
    for spec in group:
        layers[spec.key] = pruner.prune(block, spec, weights, stats)
        meter.layer(spec)
    return layers
