"""Pruning one layer of a block in memory: score, reorder, select, re-prune, reconstruct, quantise, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crepe_deploy.model.decoder import Decoder, LinearSpec, follow
from crepe_deploy.model.stats import Stats, reorder_stats
from crepe_deploy.pattern import NM, Pattern
from crepe_deploy.phases import Phases
from crepe_deploy.select import select
from crepe_deploy.store.audit import count_zeros
from crepe_deploy.store.values import scales_name

from .config import PruneConfig
from .methods.base import ScoreMethod, Solution
from .methods.numbers import check_kept, exponent_of, naming, scaled, with_drift
from .methods.ria import RIA
from .steps.folds import Foldable, foldables
from .steps.permute import Permuter
from .steps.values import Int8
from .targets import kind_of

TINY = 1e-30  # of a sum of squares in fp32: below it they were rounded away


@dataclass(frozen=True)
class LayerResult:
    """What pruning did to one layer.

    error: ||(W - W')D||_F / ||W D||_F, see `layer_error`. weighting: D is the norms of the inputs ("input-norm") or the
    identity ("none"). zeros: in the pruned weight. notes: what the method and the steps have to say, for the manifest.
    """

    error: float
    weighting: str
    zeros: int
    notes: dict[str, float]


@dataclass(frozen=True)
class LayerPruner:
    """Prunes layers in place; patterns by tensor name. phases: where the seconds go."""

    decoder: Decoder
    config: PruneConfig
    patterns: Mapping[str, Pattern]
    phases: Phases

    def prune(self, block: nn.Module, spec: LinearSpec, weights: dict[str, Tensor], stats: Stats) -> LayerResult:
        """Prune one layer of `block`, whose tensors by checkpoint name are `weights`; both follow.

        The scales of quantised values join `weights`, by `scales_name`.
        Raises NumericalError naming the layer.
        """
        weight = spec.of(weights)
        with naming(spec.key):
            pruned, weighting, notes = self._pruned(block, spec, weights, weight, stats)
            with self.phases("error"):
                error = layer_error(weight, pruned, weighting)
        weight.copy_(pruned)
        follow(spec.computed(block), weight)
        return LayerResult(error, "none" if weighting is None else "input-norm", count_zeros(pruned), notes)

    def _pruned(
        self, block: nn.Module, spec: LinearSpec, weights: dict[str, Tensor], weight: Tensor, stats: Stats
    ) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        """The pruned weight (out, in) in the dtype of `weight`, the norms of its inputs, and notes.

        Only updating steps change kept weights. All arithmetic is done on weights of a size that fp32 can square.
        """
        exponent = exponent_of(weight)
        score: Tensor | None = None
        if isinstance(self.config.method, ScoreMethod) and not self.config.keeps_all:
            with self.phases("score"):
                method = self.config.kinds.get(kind_of(spec.path), self.config.method)
                score = method.score(scaled(weight, exponent), stats)
        notes: dict[str, float] = {}
        if self.config.steps.permute is not None:
            with self.phases("permute"):
                score, stats, notes = self._reorder(block, spec, weights, score, stats, self.config.steps.permute)
        exponent, stats = with_drift(exponent, stats)
        start = scaled(weight, exponent)
        solution, solved_notes = self._solve(start, score, stats, self.patterns[spec.key])
        norms = input_norms(stats)
        with self.phases("update"):
            pruned = weight
            if solution.weight is not start:
                pruned = scaled(solution.weight, -exponent).to(weight.dtype)
                solved_notes |= check_kept(weight, pruned, solution.mask, norms)
            pruned = pruned.masked_fill(~solution.mask, 0)
        notes |= solved_notes
        if self.config.steps.values is not None:
            with self.phases("values"):
                pruned, damping = self._on_grid(spec, weights, pruned, solution.mask, stats, self.config.steps.values)
            notes |= {"values_damping": damping} if damping else {}
        return pruned, norms, notes

    def _on_grid(
        self, spec: LinearSpec, weights: dict[str, Tensor], pruned: Tensor, mask: Tensor, stats: Stats, values: Int8
    ) -> tuple[Tensor, float]:
        """The pruned weight (out, in) with what is kept on a grid, whose scales join `weights`, and the damping."""
        found, damping = values(pruned, mask, stats, pruned.dtype)
        weights[scales_name(spec.key)] = found.scales.to(pruned.dtype)
        return found.weight.to(pruned.dtype), damping

    def _solve(
        self, weight: Tensor, score: Tensor | None, stats: Stats, pattern: Pattern
    ) -> tuple[Solution, dict[str, float]]:
        """What method and steps make of the weight (out, in), and all their notes."""
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
        return solution, notes

    def _first(self, weight: Tensor, score: Tensor | None, stats: Stats, pattern: Pattern) -> Solution:
        """What the method itself gives: a mask, and the weights as they are or as it updates them."""
        if self.config.keeps_all:
            return Solution(weight, torch.ones_like(weight, dtype=torch.bool), {})
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
        if score is None:
            weight = stored.T if spec.transposed else stored
            judge = RIA().score(scaled(weight, exponent_of(weight)), stats)
        else:
            judge = score
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
        for name, parameter in module.named_parameters():
            stored = weights[self.decoder.key(f"{prefix}.{producer}.{name}")]
            axis = 1 if transposed and stored.ndim == 2 else 0
            reorder_rows(stored, fold.output_order(orders, stored.shape[axis]), axis)
            follow(parameter, stored)
        scales = weights.get(scales_name(self.decoder.key(f"{prefix}.{producer}.weight")))
        if scales is not None:
            reorder_rows(scales, fold.output_order(orders, len(scales)), 0)


def reorder_rows(tensor: Tensor, order: Tensor, axis: int) -> None:
    """Reorder `tensor` along `axis` in place: entry i becomes entry order[i]."""
    tensor.copy_(tensor.index_select(axis, order))


def input_norms(stats: Stats) -> Tensor | None:
    """Norms (in,) of the input channels from whichever statistic was collected, or None."""
    if stats.hessian is not None:
        return (stats.hessian.diagonal() / 2).sqrt()
    return stats.col_norm


def layer_error(dense: Tensor, pruned: Tensor, col_norm: Tensor | None) -> float:
    """||(W - W')D||_F / ||W D||_F for weights (out, in), D = diag(col_norm) or the identity.

    Summed in fp32, in fp64 where that does not hold the squares; 0 where the weight does nothing.
    """
    change, size = _squares(dense, pruned, col_norm, torch.float32)
    if not (math.isfinite(change) and TINY < size < math.inf):
        change, size = _squares(dense, pruned, col_norm, torch.float64)
    return (change / size) ** 0.5 if size else 0.0


def _squares(dense: Tensor, pruned: Tensor, col_norm: Tensor | None, dtype: torch.dtype) -> tuple[float, float]:
    """||(W - W')D||_F^2 and ||W D||_F^2."""
    change, size = 0.0, 0.0
    weights = None if col_norm is None else col_norm.to(dtype).square()
    for before, after in zip(torch.split(dense, 1024), torch.split(pruned, 1024), strict=True):
        before = before.to(dtype)
        change += _weighted_square(before - after, weights)
        size += _weighted_square(before, weights)
    return change, size


def _weighted_square(matrix: Tensor, weights: Tensor | None) -> float:
    squares = matrix.square().sum(0)
    return float(squares.sum() if weights is None else squares @ weights)
