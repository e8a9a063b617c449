"""Wanda (Sun et al., ICLR 2024): magnitude times the norm of the input feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crepe_deploy.model.stats import Need, Stats, need_col_norm

from .base import Feed


@dataclass(frozen=True)
class Wanda:
    """S_ij = |W_ij| * ||X_j||_2."""

    needs: ClassVar[frozenset[Need]] = frozenset({"col_norm"})
    feed: ClassVar[Feed] = "dense"

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """`weight` (out, in), any float dtype -> fp32 (out, in). Does not mutate.

        Raises CalibrationError if `stats.col_norm` (in,) is missing or misshapen.
        """
        return weight.detach().abs().float().mul_(need_col_norm(stats, weight))
