"""Pruning the layers of one block that is in memory: order, score, select, re-prune, reconstruct, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.model.stats import Need, Stats, reorder_stats
from crepe_deploy.pattern import NM, Pattern
from crepe_deploy.phases import Phases
from crepe_deploy.select import select
from crepe_deploy.store.manifest import TensorRecord

from .methods.base import ScoreMethod, SolveMethod
from .methods.ria import RIA
from .steps import Steps
from .steps.folds import Foldable, foldables


@dataclass(frozen=True)
class Treatment:
    """What is done to every layer: the method, the steps around it, and each tensor's pattern by checkpoint name."""

    method: ScoreMethod | SolveMethod
    steps: Steps
    patterns: Mapping[str, Pattern]

    @property
    def needs(self) -> frozenset[Need]:
        """The calibration statistics that the method and the steps read."""
        return self.method.needs | self.steps.needs


@dataclass
class BlockPruner:
    """Prunes blocks in place. phases: where the seconds go. records: what was done, by tensor name."""

    decoder: Decoder
    treatment: Treatment
    phases: Phases = field(default_factory=Phases)
    records: dict[str, TensorRecord] = field(default_factory=dict)

    def prune(self, block: nn.Module, spec: LinearSpec, weights: dict[str, Tensor], stats: Stats) -> None:
        """Prune one layer of `block`, whose tensors by checkpoint name are `weights`; both follow."""
        stored = weights[spec.key]
        weight = stored.T if spec.transposed else stored
        score: Tensor | None = None
        if isinstance(self.treatment.method, ScoreMethod):
            with self.phases("score"):
                score = self.treatment.method.score(weight, stats)
        notes: dict[str, float] = {}
        if self.treatment.steps.permute is not None:
            with self.phases("permute"):
                score, stats = self._reorder(block, spec, weights, score, stats, notes)
        self.records[spec.key] = self._prune_weight(weight, score, stats, spec, notes)
        _follow(block, spec.path, "weight", stored)

    def _prune_weight(
        self, weight: Tensor, score: Tensor | None, stats: Stats, spec: LinearSpec, notes: dict[str, float]
    ) -> TensorRecord:
        """Prune weight (out, in) in place. Without updating steps kept weights are untouched."""
        steps, pattern = self.treatment.steps, self.treatment.patterns[spec.key]
        start, mask = weight, None
        if score is not None:
            with self.phases("select"):
                mask = select(score, pattern)
        elif isinstance(self.treatment.method, SolveMethod):
            with self.phases("solve"):
                solution = self.treatment.method.solve(weight, stats, pattern)
            start, mask = solution.weight, solution.mask
            notes |= solution.notes
        assert mask is not None
        if steps.reprune is not None:
            with self.phases("reprune"):
                mask, found = steps.reprune(weight, mask, stats, pattern)
            start, notes = weight, notes | {f"reprune_{name}": value for name, value in found.items()}
        if steps.reconstruct is not None:
            with self.phases("reconstruct"):
                solution = steps.reconstruct(weight, start, mask, stats, pattern)
            start, mask = solution.weight, solution.mask
            notes |= {f"reconstruct_{name}": value for name, value in solution.notes.items()}
        with self.phases("update"):
            pruned = start.to(weight.dtype).masked_fill(~mask, 0)
        with self.phases("error"):
            norms = input_norms(stats)
            error = layer_error(weight, pruned, norms)
        weight.copy_(pruned)
        shape = (spec.in_features, spec.out_features) if spec.transposed else (spec.out_features, spec.in_features)
        return TensorRecord(
            shape=shape,
            transposed=spec.transposed,
            pattern=str(pattern),
            zeros=0,
            sparsity=0.0,
            layer_error=error,
            layer_error_weighting="none" if norms is None else "input-norm",
            notes=notes,
        )

    def _reorder(
        self,
        block: nn.Module,
        spec: LinearSpec,
        weights: dict[str, Tensor],
        score: Tensor | None,
        stats: Stats,
        notes: dict[str, float],
    ) -> tuple[Tensor | None, Stats]:
        """Reorder the layer's inputs, and the outputs of the layers before it, where that folds; score and stats too.

        The score is taken before, for a neighbourhood means something only in the original order.
        """
        index = self.decoder.blocks.index(block)
        fold = next((found for found in foldables(self.decoder, index) if found.path == spec.path), None)
        pattern, permuter = self.treatment.patterns[spec.key], self.treatment.steps.permute
        if fold is None or permuter is None or not isinstance(pattern, NM):
            return score, stats
        stored = weights[spec.key]
        judge = RIA().score(stored.T if spec.transposed else stored, stats) if score is None else score
        orders = [permuter.search(rows, pattern.n, pattern.m) for rows in fold.search_rows(judge)]
        columns = fold.input_order(orders)
        reorder_rows(weights[spec.key], columns, 0 if spec.transposed else 1)
        prefix = f"{self.decoder.blocks_path}.{index}"
        for producer in fold.producers:
            self._reorder_outputs(block, prefix, producer, fold, orders, weights)
        notes["score_retained_gain"] = permuter.gain(judge, columns, pattern.n, pattern.m)
        return (None if score is None else score[:, columns]), reorder_stats(stats, columns)

    def _reorder_outputs(
        self,
        block: nn.Module,
        prefix: str,
        producer: str,
        fold: Foldable,
        orders: list[Tensor],
        weights: dict[str, Tensor],
    ) -> None:
        """Reorder the rows of `producer`, and its bias."""
        module = block.get_submodule(producer)
        transposed = not isinstance(module, nn.Linear)
        for name, _ in module.named_parameters():
            stored = weights[self.decoder.key(f"{prefix}.{producer}.{name}")]
            axis = 1 if transposed and stored.ndim == 2 else 0
            reorder_rows(stored, fold.output_order(orders, stored.shape[axis]), axis)
            _follow(block, producer, name, stored)


def reorder_rows(tensor: Tensor, order: Tensor, axis: int) -> None:
    """Reorder `tensor` along `axis` in place: entry i becomes entry order[i]."""
    tensor.copy_(tensor.index_select(axis, order))


def _follow(block: nn.Module, path: str, name: str, stored: Tensor) -> None:
    """Bring the block's own copy of a tensor up to date where it is one, in the dtype of computation."""
    computed = block.get_submodule(path).get_parameter(name)
    if computed.data_ptr() != stored.data_ptr():
        computed.data.copy_(stored)


def input_norms(stats: Stats) -> Tensor | None:
    """Norms (in,) of the input channels from whichever statistic was collected, or None."""
    if stats.hessian is not None:
        return (stats.hessian.diagonal() / 2).sqrt()
    return stats.col_norm


def layer_error(dense: Tensor, pruned: Tensor, col_norm: Tensor | None) -> float:
    """||(W - W')D||_F / ||W D||_F for weights (out, in), D = diag(col_norm) or the identity."""
    change, size = 0.0, 0.0
    for before, after in zip(torch.split(dense, 1024), torch.split(pruned, 1024), strict=True):
        before = before.float()
        change += _weighted_square(before - after, col_norm)
        size += _weighted_square(before, col_norm)
    return (change / size) ** 0.5 if size else 0.0


def _weighted_square(matrix: Tensor, col_norm: Tensor | None) -> float:
    squares = matrix.square().sum(0)
    return float(squares.sum() if col_norm is None else squares @ col_norm.square())
