"""Pruning one layer of a block that is in memory: score, reorder, select, re-prune, reconstruct, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.model.stats import Stats, reorder_stats
from crepe_deploy.pattern import NM, Pattern
from crepe_deploy.phases import Phases
from crepe_deploy.select import select

from .config import PruneConfig
from .methods.base import ScoreMethod, Solution
from .methods.ria import RIA
from .steps.folds import Foldable, foldables
from .steps.permute import Permuter


@dataclass(frozen=True)
class LayerResult:
    """What pruning did to one layer.

    error: ||(W - W')D||_F / ||W D||_F, see `layer_error`. weighting: D is the norms of the inputs ("input-norm") or the
    identity ("none"). notes: what the method and the steps have to say, for the manifest.
    """

    error: float
    weighting: str
    notes: dict[str, float]


@dataclass(frozen=True)
class LayerPruner:
    """Prunes layers in place; patterns by tensor name. phases: where the seconds go."""

    decoder: Decoder
    config: PruneConfig
    patterns: Mapping[str, Pattern]
    phases: Phases

    def prune(self, block: nn.Module, spec: LinearSpec, weights: dict[str, Tensor], stats: Stats) -> LayerResult:
        """Prune one layer of `block`, whose tensors by checkpoint name are `weights`; both follow."""
        stored = weights[spec.key]
        weight = stored.T if spec.transposed else stored
        score: Tensor | None = None
        if isinstance(self.config.method, ScoreMethod):
            with self.phases("score"):
                score = self.config.method.score(weight, stats)
        notes: dict[str, float] = {}
        if self.config.steps.permute is not None:
            with self.phases("permute"):
                score, stats, notes = self._reorder(block, spec, weights, score, stats, self.config.steps.permute)
        pruned, solved_notes = self._solve(weight, score, stats, self.patterns[spec.key])
        with self.phases("error"):
            norms = input_norms(stats)
            error = layer_error(weight, pruned, norms)
        weight.copy_(pruned)
        _follow(block, spec.path, "weight", stored)
        return LayerResult(error, "none" if norms is None else "input-norm", notes | solved_notes)

    def _solve(
        self, weight: Tensor, score: Tensor | None, stats: Stats, pattern: Pattern
    ) -> tuple[Tensor, dict[str, float]]:
        """The pruned weight (out, in) in the dtype of `weight`, and notes. Only updating steps change kept weights."""
        steps = self.config.steps
        solution = self._first(weight, score, stats, pattern)
        notes = dict(solution.notes)
        if steps.reprune is not None:
            with self.phases("reprune"):
                mask, swaps = steps.reprune(weight, solution.mask, stats, pattern)
            solution = Solution(weight, mask, {})
            notes |= {f"reprune_{name}": value for name, value in swaps.items()}
        if steps.reconstruct is not None:
            with self.phases("reconstruct"):
                solution = steps.reconstruct(weight, solution.weight, solution.mask, stats, pattern)
            notes |= {f"reconstruct_{name}": value for name, value in solution.notes.items()}
        with self.phases("update"):
            return solution.weight.to(weight.dtype).masked_fill(~solution.mask, 0), notes

    def _first(self, weight: Tensor, score: Tensor | None, stats: Stats, pattern: Pattern) -> Solution:
        """What the method itself gives: a mask, and the weights as they are or as it updates them."""
        if isinstance(self.config.method, ScoreMethod):
            assert score is not None
            with self.phases("select"):
                return Solution(weight, select(score, pattern), {})
        with self.phases("solve"):
            return self.config.method.solve(weight, stats, pattern)

    def _reorder(
        self,
        block: nn.Module,
        spec: LinearSpec,
        weights: dict[str, Tensor],
        score: Tensor | None,
        stats: Stats,
        permuter: Permuter,
    ) -> tuple[Tensor | None, Stats, dict[str, float]]:
        """Reorder the layer's inputs, and the outputs of the layers before it, where that folds; score and stats too.

        The score is taken before, for a neighbourhood means something only in the original order.
        """
        index = self.decoder.blocks.index(block)
        fold = next((fold for fold in foldables(self.decoder, index) if fold.path == spec.path), None)
        pattern = self.patterns[spec.key]
        if fold is None or not isinstance(pattern, NM) or spec.in_features // fold.heads % pattern.m:
            return score, stats, {}  # a group that spans heads cannot be filled from within one
        stored = weights[spec.key]
        judge = RIA().score(stored.T if spec.transposed else stored, stats) if score is None else score
        orders = [permuter.search(rows, pattern.n, pattern.m) for rows in fold.search_rows(judge)]
        columns = fold.input_order(orders)
        reorder_rows(weights[spec.key], columns, 0 if spec.transposed else 1)
        prefix = f"{self.decoder.blocks_path}.{index}"
        for producer in fold.producers:
            self._reorder_outputs(block, prefix, producer, fold, orders, weights)
        notes = {"score_retained_gain": permuter.gain(judge, columns, pattern.n, pattern.m)}
        return (None if score is None else score[:, columns]), reorder_stats(stats, columns), notes

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
