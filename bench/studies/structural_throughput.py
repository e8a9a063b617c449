"""How fast structural candidates are judged: all together and narrow, against each from scratch with transformers.

From scratch is what the method's public code does: one dense model in memory, the candidate's levels written into it as
masked matrices of full size, every window run through the whole model, KL over the same top-k logits. Two comparisons:

same windows    the same candidates on the same windows, so that only sharing, narrowness and batching count
generation      one generation's choice of the best child: staged selection against all children on all windows
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...model.decoder import Decoder
from ...progress import Meter, silent
from ...quality.perplexity import load_model
from ...structural.build import Builder
from ...structural.config import TyrConfig
from ...structural.evolve import Rules, brood, ladders, staged
from ...structural.fitness import FitnessJudge, Reference, dense_reference, top_k_divergence
from ...structural.narrow import output_specs
from ...structural.plan import Geometry
from ...structural.prepare import config_units
from ...structural.stages import iteration_levels
from ...structural.supernet import Store
from ...structural.units import Allocation, Width, even, plan_budget, step_units

BUILD_WINDOWS = 2  # of calibration: the levels' values do not change the pace


def throughput(model: Path, tokens: Tensor, config: TyrConfig, folder: Path) -> dict[str, Any]:
    """Candidates a minute of both ways in this process, one after the other, and how far their fitness differs."""
    decoder = Decoder(model)
    units = config_units(config, Geometry.from_config(decoder.config))
    parent = even(units, plan_budget(units, config.sparsity))
    store = Store(folder)
    Builder(decoder, units.geometry, tokens[:BUILD_WINDOWS], config.rules(), lambda _: None, Meter(silent, 0)).build(
        iteration_levels(units, parent, 0), store, config.accumulation
    )
    reference = dense_reference(decoder, tokens, config.fitness, config.top_k)
    judge = FitnessJudge(decoder, units.geometry, reference, store)
    steps = step_units(units.attention_count, 0), step_units(units.neuron_count, 0)
    draw = random.Random(config.seed)
    children = brood(parent, ladders(units, parent, *steps), config.offspring, draw)
    rules = Rules(1, config.offspring, len(tokens), config.seed)
    few = list(range(rules.stages()[0].windows))

    def score(candidates: Sequence[Allocation], windows: Sequence[int]) -> list[float]:
        return judge([units.widths(candidate) for candidate in candidates], windows)

    scratch = Scratch(load_model(model), decoder, reference, store)
    scratch(units.widths(parent), few)  # both ways once before the clock: allocations, kernels
    score(children[:1], few)
    together, ours = _timed(lambda: score(children, few))
    alone, theirs = _timed(lambda: [scratch(units.widths(child), few) for child in children])
    chosen, _ = _timed(lambda: staged(children, rules.stages(), score, len(tokens), draw))
    whole, _ = _timed(lambda: scratch(units.widths(children[0]), range(len(tokens))))
    count = len(children)
    return {
        "offspring": count,
        "sparsity": config.sparsity,
        "windows": {"first_stage": len(few), "all": len(tokens), "length": int(tokens.shape[1])},
        "same_windows": _pace(count, together, alone),
        "generation": _pace(count, chosen, whole.times(count)),
        "largest_relative_fitness_difference": max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)),
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class Cost:
    """Seconds by the wall clock, and of this process's processor time, which other work hardly changes."""

    wall: float
    processor: float

    def times(self, count: int) -> Cost:
        """The same work so many times."""
        return Cost(self.wall * count, self.processor * count)


def _timed(work: Any) -> tuple[Cost, Any]:
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return Cost(time.perf_counter() - wall, time.process_time() - processor), result


def _pace(count: int, ours: Cost, theirs: Cost) -> dict[str, float]:
    return {
        "candidates_a_minute": 60 * count / ours.wall,
        "from_scratch_a_minute": 60 * count / theirs.wall,
        "ratio": theirs.wall / ours.wall,
        "processor_ratio": theirs.processor / ours.processor,
    }


class Scratch:
    """Judges one candidate at a time with a whole transformers model, masked."""

    def __init__(self, model: Any, decoder: Decoder, reference: Reference, store: Store) -> None:
        self.model, self.reference, self.store = model, reference, store
        self.paths = [
            [f"{decoder.blocks_path}.{index}.{spec.path}" for spec in output_specs(decoder, index)]
            for index in range(len(decoder.blocks))
        ]

    @torch.inference_mode()
    def __call__(self, widths: Sequence[Width], windows: Sequence[int]) -> float:
        """The mean KL on these windows, one by one."""
        assert self.reference.indices is not None and self.reference.likely is not None
        for index, (width, paths) in enumerate(zip(widths, self.paths, strict=True)):
            levels = (
                self.store.attention(index, (width.groups, width.queries)), self.store.neurons(index, width.neurons)
            )  # fmt: skip
            for path, level in zip(paths, levels, strict=True):
                module = self.model.get_submodule(path)
                module.weight.data.copy_(level.full(module.in_features))
        total = 0.0
        for window in windows:
            logits = self.model(self.reference.tokens[window : window + 1], use_cache=False).logits[0]
            total += top_k_divergence(logits, self.reference.indices[window], self.reference.likely[window])
        return total / (len(windows) * self.reference.tokens.shape[1])
