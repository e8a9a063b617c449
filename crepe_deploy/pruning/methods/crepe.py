"""CRePE: RIA's relative importance with row and column coefficients and a 2D local neighbourhood term.

The paper (arXiv 2606.01544) publishes the three terms, one coefficient each, and a kernel size, but not the exact
formula, so two neighbourhood terms are implemented; R is `relative_importance`, A = |W|, N_k the k x k window:

ratio    S_ij = (R_ij + gamma * c_k * A_ij / sum_{N_k} A) * ||X_j||_2 ^ exponent      c_k = k^2 (1/in + 1/out) / 2
smooth   S_ij = (R_ij + gamma * mean_{N_k} R)             * ||X_j||_2 ^ exponent

The window includes its centre. Outside the matrix `ratio` adds zeros and `smooth` averages only what exists. c_k
brings the ratio to the size of a row or column term, so that gamma means the same for every shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.stats import Need, Stats, need_col_norm

from .base import Feed, check_range
from .ria import SUM_FLOOR, relative_importance

Neighbourhood = Literal["ratio", "smooth"]
CHUNK = 65536  # entries filtered at a time, so that all passes over them stay in the cache


@dataclass(frozen=True)
class Crepe:
    """`alpha` weighs the row term, `beta` the column term, `gamma` the neighbourhood.

    The defaults are exactly RIA; what makes it CRePE is data, in presets.
    """

    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.0
    kernel_size: int = 7
    exponent: float = 0.5
    neighbourhood: Neighbourhood = "smooth"
    needs: ClassVar[frozenset[Need]] = frozenset({"col_norm"})
    feed: ClassVar[Feed] = "dense"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma", "exponent"):
            check_range(name, getattr(self, name), 0)
        if self.alpha == self.beta == self.gamma == 0:
            raise ConfigError("alpha, beta and gamma are all 0: every weight would score the same")
        if type(self.kernel_size) is not int or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ConfigError(f"kernel_size is {self.kernel_size!r}; it must be an odd whole number")
        if self.neighbourhood not in get_args(Neighbourhood):
            raise ConfigError(f"neighbourhood '{self.neighbourhood}' is unknown; known: ratio, smooth")

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """`weight` (out, in), any float dtype -> fp32 (out, in). Does not mutate.

        Raises CalibrationError if `stats.col_norm` (in,) is missing or misshapen.
        """
        score = relative_importance(weight, self.alpha, self.beta)
        if self.gamma and self.neighbourhood == "ratio":
            score = _plus_ratio(score, weight, self.gamma, self.kernel_size)
        elif self.gamma:
            score = _plus_mean(score, self.gamma, self.kernel_size)
        return score.mul_(need_col_norm(stats, weight).pow(self.exponent))


def box_sums(values: Tensor, kernel_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, sums) in order: for each entry of `values[rows]` the sum over the window centred on it.

    `values` (out, in); windows have the odd side `kernel_size` and zeros outside the matrix. Only additions, so nothing
    cancels, and about 2 log2(kernel_size) of them per axis: windows of 1, 2, 4, ... entries are doubled and joined.
    Everything happens on flat zero-padded rows, where a step down is a step of one padded row. A window larger than
    the matrix is cut to what it can reach.
    """
    rows, columns = values.shape
    down, right = (min(kernel_size // 2, size - 1) for size in (rows, columns))
    pitch = columns + 2 * right
    height = max(1, CHUNK // pitch)
    for start in range(0, rows, height):
        end = min(start + height, rows)
        first, last = max(0, start - down), min(rows, end + down)
        padded = F.pad(values[first:last], (right, right, down - (start - first), down - (last - end)))
        sums = _window_sums(_window_sums(padded.view(-1), 2 * right + 1, 1), 2 * down + 1, pitch)
        yield slice(start, end), sums.as_strided((end - start, columns), (pitch, 1))


def _window_sums(flat: Tensor, width: int, step: int) -> Tensor:
    """y[t] = flat[t] + flat[t + step] + ... (`width` terms, odd), for every t where all terms exist."""
    total, power, size = flat, flat, 1
    while 2 * size <= width:
        power = power[: -size * step] + power[size * step :]
        size *= 2
        if width & size:
            part = power[(width & (size - 1)) * step :]
            total = total[: len(part)] + part
    return total


def _plus_ratio(score: Tensor, weight: Tensor, gamma: float, kernel_size: int) -> Tensor:
    """`score` + gamma * c_k * A / (window sum of A), computed in place."""
    magnitude = weight.detach().abs().float()
    scale = kernel_size**2 * (1 / weight.shape[1] + 1 / weight.shape[0]) / 2
    for rows, sums in box_sums(magnitude, kernel_size):
        score[rows].addcdiv_(magnitude[rows], sums.clamp_(min=SUM_FLOOR), value=gamma * scale)
    return score


def _plus_mean(score: Tensor, gamma: float, kernel_size: int) -> Tensor:
    """`score` + gamma * (mean of `score` over the entries of the window that exist) -> new tensor."""
    down, right = (_window_counts(size, kernel_size // 2, score.device) for size in score.shape)
    result = torch.empty_like(score)
    for rows, sums in box_sums(score, kernel_size):
        torch.addcmul(score[rows], sums.mul_(gamma / down[rows].unsqueeze(1)), 1 / right, out=result[rows])
    return result


def _window_counts(size: int, reach: int, device: torch.device) -> Tensor:
    """(size,) fp32: how many positions within `reach` of each position exist."""
    position = torch.arange(size, device=device)
    return ((position + reach).clamp(max=size - 1) - (position - reach).clamp(min=0) + 1).float()
