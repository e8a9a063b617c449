"""Grids of quantised weights: a weight is a small whole number, its code, times a scale that its row or group shares.

A grid of b bits has the codes -2^(b-1) to 2^(b-1)-1; code 0 is weight 0. A weight is the product code * scale in fp32
rounded to the model's dtype, so that what is written needs no format of its own and still gives its codes back: the
rounding moves code * scale by less than half a scale, for 128 * 2^-9 < 1/2 (bf16 and 8 bits, the worst case).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError, NumericalError

BITS: Final = (4, 8)
SHRINKS: Final = tuple(step / 50 for step in range(50, 24, -1))  # of the largest weight's scale: 1 to 0.5


@dataclass(frozen=True)
class Grid:
    """`bits` of a code; `group`: columns that share a scale, None for the whole row; `dtype`: of weights and scales.

    The last group of a row may be narrower. Raises ConfigError for bits that there are not and for an empty group.
    """

    bits: int
    group: int | None
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"values of {self.bits} bits; there are {BITS[0]} and {BITS[1]}")
        if self.group is not None and self.group < 1:
            raise ConfigError(f"group is {self.group}; a scale needs at least one column")

    def __str__(self) -> str:
        return f"int{self.bits}" + ("" if self.group is None else f":group={self.group}")

    def width(self, in_features: int) -> int:
        """Columns that share a scale in rows of `in_features`."""
        return in_features if self.group is None else min(self.group, in_features)

    def scale(self, columns: Tensor, mask: Tensor) -> Tensor:
        """The scale of each output for one group, `columns` fp32 and `mask` (width, out) -> fp32 (out,).

        Of the shares of the largest kept weight's scale, the one with the least squared error. 1 where all are 0.
        Raises NumericalError where `columns` are not finite.
        """
        kept = columns.masked_fill(~mask, 0)
        largest = kept.abs().amax(0)
        if not largest.isfinite().all():
            raise NumericalError("a weight to be quantised is not finite: give other text, or leave the layer out")
        least = torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps  # the smallest there is
        best = torch.ones_like(largest)
        error = torch.full_like(largest, torch.inf)
        for shrink in SHRINKS:
            scale = (largest * (shrink / self._top)).clamp_min(least).to(self.dtype).float()
            reached = (self.nearest(kept, scale) - kept).div_(largest).square_().sum(0)  # in reach of fp32's squares
            better = (reached < error) & (largest > 0)
            best, error = torch.where(better, scale, best), torch.where(better, reached, error)
        return best

    def codes(self, weights: Tensor, scale: Tensor) -> Tensor:
        """The nearest codes of `weights` for `scale`, broadcast against each other -> int8."""
        return self._code(weights.float(), scale).to(torch.int8)

    def nearest(self, weights: Tensor, scale: Tensor) -> Tensor:
        """The nearest weights on the grid, as they will be stored -> fp32."""
        return self._code(weights, scale).mul_(scale).to(self.dtype).float()

    @property
    def _top(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def _code(self, weights: Tensor, scale: Tensor) -> Tensor:
        return (weights / scale).round_().clamp_(-self._top - 1, self._top).add_(0.0)  # -0.0 is no code


@dataclass(frozen=True)
class Quantized:
    """weight: fp32 (out, in), every entry on the grid, zero where pruned. scales: fp32 (out, groups)."""

    weight: Tensor
    scales: Tensor


def round_to_nearest(weight: Tensor, mask: Tensor, grid: Grid) -> Quantized:
    """`weight` (out, in) on the `grid` under `mask` (out, in), each kept weight by itself. Does not mutate."""
    columns, keep = weight.detach().t().float(), mask.t()
    width = grid.width(len(columns))
    scales, rounded = [], []
    for part, kept in zip(torch.split(columns, width), torch.split(keep, width), strict=True):
        scales.append(grid.scale(part, kept))
        rounded.append(grid.nearest(part, scales[-1]).masked_fill_(~kept, 0))
    return Quantized(torch.cat(rounded).t().contiguous(), torch.stack(scales, dim=1))


def codes_of(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The codes, int8 (out, in), of a `weight` (out, in) that is on the `grid` with `scales` (out, groups).

    Raises NumericalError where a weight is not code * scale to the bit.
    """
    width = grid.width(weight.shape[1])
    spread = scales.float().repeat_interleave(width, dim=1)[:, : weight.shape[1]]
    codes = grid.codes(weight, spread)
    if not torch.equal(grid.nearest(weight.float(), spread), weight.float()):
        raise NumericalError(f"a weight is not on the grid of its scales ({grid.bits} bits, groups of {width})")
    return codes
