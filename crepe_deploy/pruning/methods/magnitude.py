"""Magnitude pruning: the baseline that needs no calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crepe_deploy.model.stats import Need, Stats

from .base import Feed


@dataclass(frozen=True)
class Magnitude:
    """S = |W|."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    feed: ClassVar[Feed] = "dense"

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """`weight` (out, in), any float dtype -> fp32 (out, in). `stats` is not read. Does not mutate."""
        return weight.detach().abs().float()
