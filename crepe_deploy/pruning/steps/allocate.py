"""Allocation on a model: walk its dense blocks, and give every tensor its pattern under one exact budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from crepe_deploy.model.calibrate import Collector, Stream, shared_inputs
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.pattern import NM, Pattern, Unstructured, zero_count
from crepe_deploy.progress import Progress, silent

from .allocators import Allocator, Unit, fit_levels

Group = list[LinearSpec]


def uniform(targets: Sequence[Group], pattern: Pattern) -> dict[str, Pattern]:
    """The same pattern for every tensor."""
    return {spec.key: pattern for block in targets for spec in block}


def allocate(
    decoder: Decoder,
    targets: Sequence[Group],
    stream: Stream,
    allocator: Allocator,
    pattern: Pattern,
    step: Progress = silent,
) -> dict[str, Pattern]:
    """A pattern like `pattern` for every target by name; together they keep as many weights as `pattern` would.

    stream: in front of the first block, sent through the dense model. Layers that read one input get one pattern, for
    they are served as one layer; where zeros are counted over matrices they need not. Raises ConfigError.
    """
    seen: list[Any] = []
    units: list[Unit] = []
    for index, block_targets in enumerate(targets):
        groups = _observe(decoder, index, block_targets, stream, allocator, pattern, seen)
        units += [_unit(len(seen) - 1, group, pattern) for group in groups]
        step(index + 1, len(targets))
    kept = sum(
        spec.out_features * spec.in_features - zero_count(pattern, spec.out_features, spec.in_features)
        for block in targets
        for spec in block
    )
    fractions = allocator.fractions(seen, units, kept / sum(unit.size for unit in units))
    ideal = [fraction * unit.levels for fraction, unit in zip(fractions, units, strict=True)]
    levels = fit_levels(ideal, [unit.cost for unit in units], [unit.levels - 1 for unit in units], kept)
    return {key: _pattern(level, unit, pattern) for level, unit in zip(levels, units, strict=True) for key in unit.keys}


def summary(patterns: dict[str, Pattern]) -> dict[str, int]:
    """How many tensors have each pattern."""
    return dict(sorted(Counter(str(pattern) for pattern in patterns.values()).items()))


def _observe(
    decoder: Decoder,
    index: int,
    block_targets: Group,
    stream: Stream,
    allocator: Allocator,
    pattern: Pattern,
    seen: list[Any],
) -> list[Group]:
    """Let the allocator see one dense block, and send the stream on; returns the groups of its targets."""
    collector = Collector(allocator.needs)
    with decoder.block(index) as (block, weights):
        groups = _groups(block_targets, shared_inputs(block, block_targets, stream, index), pattern)
        with collector.watching(block, block_targets):
            stream.run(block, index, advance=True)
        layers = []
        for group in groups:
            layers.append([(_weight(weights, spec), collector.stats(spec, stream.sequences)) for spec in group])
        if layers:
            seen.append(allocator.observe(layers, [_unit(index, group, pattern).levels for group in groups]))
    return groups


def _weight(weights: dict[str, Tensor], spec: LinearSpec) -> Tensor:
    return weights[spec.key].T if spec.transposed else weights[spec.key]


def _groups(block_targets: Group, shared: list[list[str]], pattern: Pattern) -> list[Group]:
    if isinstance(pattern, Unstructured) and pattern.granularity == "matrix":
        return [[spec] for spec in block_targets]
    by_path = {spec.path: spec for spec in block_targets}
    return [[by_path[path] for path in paths] for paths in shared]


def _unit(block: int, group: Group, pattern: Pattern) -> Unit:
    size = sum(spec.out_features * spec.in_features for spec in group)
    return Unit(block, tuple(spec.key for spec in group), size, _levels(group, size, pattern))


def _levels(group: Group, size: int, pattern: Pattern) -> int:
    """Into how many steps the pattern divides what a group of layers may keep."""
    if isinstance(pattern, NM):
        return pattern.m
    return group[0].in_features if pattern.granularity == "row" else size


def _pattern(level: int, unit: Unit, pattern: Pattern) -> Pattern:
    if isinstance(pattern, NM):
        return NM(level, pattern.m)
    return Unstructured(1 - level / unit.levels, pattern.granularity)
