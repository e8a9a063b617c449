"""RIA (Zhang et al., ICLR 2024): relative importance of a weight in its row and column, times its input's activity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crepe_deploy.model.stats import Need, Stats, need_col_norm

from .base import Feed, check_range

# Smallest divisor: an all-zero row, column or window scores 0 instead of 0/0, and its reciprocal stays finite.
SUM_FLOOR = 1e-30
CHUNK = 65536  # entries scaled at a time: a second matrix-sized buffer would cost more than the arithmetic


@dataclass(frozen=True)
class RIA:
    """S_ij = (|W_ij| / sum_i' |W_i'j| + |W_ij| / sum_j' |W_ij'|) * ||X_j||_2 ^ exponent."""

    exponent: float = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"col_norm"})
    feed: ClassVar[Feed] = "dense"

    def __post_init__(self) -> None:
        check_range("exponent", self.exponent, 0)

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """`weight` (out, in), any float dtype -> fp32 (out, in). Does not mutate.

        Raises CalibrationError if `stats.col_norm` (in,) is missing or misshapen.
        """
        return relative_importance(weight).mul_(need_col_norm(stats, weight).pow(self.exponent))


def relative_importance(weight: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha * |W_ij| / (sum of row i) + beta * |W_ij| / (sum of column j): RIA's first factor at alpha = beta = 1.

    `weight` (out, in), any float dtype -> new fp32 (out, in). All-zero rows and columns contribute 0.
    """
    magnitude = weight.detach().abs().float()
    row = alpha / magnitude.sum(dim=1, keepdim=True).clamp_(min=SUM_FLOOR)
    column = beta / magnitude.sum(dim=0, keepdim=True).clamp_(min=SUM_FLOOR)
    height = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(magnitude), height):
        rows = slice(start, start + height)
        magnitude[rows].mul_(row[rows] + column)
    return magnitude
