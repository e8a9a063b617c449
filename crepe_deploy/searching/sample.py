"""Bands of rows out of every layer, and the score on them: what a candidate is judged by without the model.

A score sees its row, its column and a window around it. So a band of rows keeps the rows that a window can reach above
and below it, and the sums of whole columns; the scores of its rows are then those of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.stats import Stats
from crepe_deploy.pruning.methods.base import ScoreMethod, SolveMethod
from crepe_deploy.pruning.methods.crepe import Crepe
from crepe_deploy.pruning.methods.neighbourhoods import Window
from crepe_deploy.pruning.methods.ria import SUM_FLOOR
from crepe_deploy.pruning.methods.wanda import Wanda


@dataclass(frozen=True)
class Band:
    """Rows [start, start + height) of a matrix. `weight` (rows, in) also holds `above` rows before and some after."""

    weight: Tensor
    start: int
    height: int
    above: int

    @property
    def rows(self) -> Tensor:
        """The band's own rows (height, in), fp32."""
        return self.weight[self.above : self.above + self.height].float()


@dataclass(frozen=True)
class LayerSample:
    """What is kept of one layer.

    col_norm, column_sums: (in,) fp32, of the whole calibration set and the whole matrix.
    sketch, token_sketch: (r, in) fp32, with sketch^T sketch an estimate of the inputs' Gram matrix; in the latter
    every token was first brought to length 1.
    """

    key: str
    out_features: int
    bands: tuple[Band, ...]
    column_sums: Tensor
    col_norm: Tensor
    sketch: Tensor
    token_sketch: Tensor


def band_starts(rows: int, bands: int, height: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """(start, height) of each band: one at random in each of `bands` equal parts of the rows.

    Parts no higher than `height` are taken whole, so that a small matrix is its own sample.
    """
    edges = [index * rows // bands for index in range(bands + 1)]
    starts = []
    for low, high in pairwise(edges):
        taken = min(height, high - low)
        offset = int(torch.randint(high - low - taken + 1, (1,), generator=generator))
        if taken:
            starts.append((low + offset, taken))
    return starts


def cut_band(weight: Tensor, start: int, height: int, reach: int) -> Band:
    """Copy a band of `weight` (out, in) with up to `reach` rows on either side."""
    first, last = max(0, start - reach), min(weight.shape[0], start + height + reach)
    return Band(weight[first:last].clone(), start, height, start - first)


def score_band(method: ScoreMethod | SolveMethod, layer: LayerSample, band: Band) -> Tensor:
    """Scores (height, in) fp32 of the band's rows, as `method.score` gives them on the whole matrix.

    Raises ConfigError for a method that cannot be scored by rows.
    """
    if isinstance(method, Wanda):
        return method.score(band.rows, Stats(col_norm=layer.col_norm))
    if not isinstance(method, Crepe):
        raise ConfigError(f"method {type(method).__name__} cannot be searched; known: crepe, wanda")
    if method.gamma and method.neighbourhood not in get_args(Window):
        raise ConfigError(f"neighbourhood '{method.neighbourhood}' cannot be searched; known: ratio, smooth")
    reach = method.kernel_size // 2 if method.gamma else 0
    first = max(0, band.above - reach)
    own = slice(band.above - first, band.above - first + band.height)
    magnitude = band.weight[first : band.above + band.height + reach].abs().float()
    row = method.alpha / magnitude.sum(dim=1, keepdim=True).clamp_(min=SUM_FLOOR)
    column = method.beta / layer.column_sums.clamp(min=SUM_FLOOR)
    relative = magnitude * (row + column)
    score = relative[own].clone()
    if method.gamma and method.neighbourhood == "ratio":
        scale = method.kernel_size**2 * (1 / magnitude.shape[1] + 1 / layer.out_features) / 2
        score.addcdiv_(magnitude[own], _sums(magnitude, method, own).clamp_(min=SUM_FLOOR), value=method.gamma * scale)
    elif method.gamma:
        down = _counts(layer.out_features, reach)[band.start : band.start + band.height]
        right = _counts(magnitude.shape[1], reach)
        score.add_(_sums(relative, method, own).div_(down.unsqueeze(1) * right), alpha=method.gamma)
    return score.mul_(layer.col_norm.pow(method.exponent))


def sampled_rows(layers: Sequence[LayerSample]) -> int:
    """Rows that are scored for each candidate."""
    return sum(band.height for layer in layers for band in layer.bands)


def _sums(values: Tensor, method: Crepe, own: slice) -> Tensor:
    """Window sums of the rows `own` of `values`: down first, so that only these rows are summed along."""
    reach = method.kernel_size // 2
    down = torch.stack([values[max(0, row - reach) : row + reach + 1].sum(0) for row in range(own.start, own.stop)])
    return F.avg_pool1d(down, method.kernel_size, stride=1, padding=reach).mul_(method.kernel_size)


def _counts(size: int, reach: int) -> Tensor:
    position = torch.arange(size)
    return ((position + reach).clamp(max=size - 1) - (position - reach).clamp(min=0) + 1).float()
