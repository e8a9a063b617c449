"""Values: the kept weights as codes of 8 or 4 bits times a scale, behind all that was done to the layer before.

`int8` has a scale for each row, `int4` one for each group of columns. The sweep (GPTQ's, under the mask) starts from
what the steps before left: with H the Gram matrix of the inputs behind everything pruned so far, the kept weights of
`exact` and `admm` are where the squared error on the wanted output has no slope, so what is lost from there on is
sum_i d_i H d_i^T of the change d alone. `rounding=nearest` takes each weight by itself and reads no statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.grid import Grid, Quantized, round_to_nearest
from crepe_deploy.model.stats import Need, Stats
from crepe_deploy.nearest import unknown

from ..methods.base import check_range
from ..methods.damping import DampingRule, check_rule
from ..methods.sparsegpt import SparseGPT, sweep_codes

Rounding = Literal["sweep", "nearest"]
COLUMNS = 32  # groups are whole multiples of it, for the packed format


@dataclass(frozen=True)
class Int8:
    """A scale for each row. `damping` of the sweep, raised as SparseGPT's where the hessian needs it."""

    rounding: Rounding = "sweep"
    damping: float = 0.01
    damping_rule: DampingRule = "mean"
    bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        check_range("damping", self.damping, 1e-8, 1)
        check_rule(self.damping_rule)
        if self.rounding not in get_args(Rounding):
            raise ConfigError(unknown("rounding", str(self.rounding), get_args(Rounding)))

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics that it reads."""
        return frozenset({"hessian"}) if self.rounding == "sweep" else frozenset()

    def grid(self, dtype: torch.dtype) -> Grid:
        """Its grid for weights of `dtype`."""
        return Grid(self.bits, None, dtype)

    def __call__(self, weight: Tensor, mask: Tensor, stats: Stats, dtype: torch.dtype) -> tuple[Quantized, float]:
        """`weight` (out, in), zero outside `mask`, on the grid of `dtype`, and the damping that was needed (0: none).

        Does not mutate. Raises NumericalError.
        """
        grid = self.grid(dtype)
        if self.rounding == "nearest":
            return round_to_nearest(weight, mask, grid), 0.0
        solver = SparseGPT(damping=self.damping, damping_rule=self.damping_rule)
        factor = solver.factor(stats, weight)
        return sweep_codes(weight, mask, factor, grid, solver.block_size), factor.damping


@dataclass(frozen=True)
class Int4(Int8):
    """A scale for each `group` of columns."""

    group: int = 128
    bits: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.group) is not int or self.group < COLUMNS or self.group % COLUMNS:
            raise ConfigError(f"group is {self.group!r}; it must be a multiple of {COLUMNS} columns")

    def grid(self, dtype: torch.dtype) -> Grid:
        """Its grid for weights of `dtype`."""
        return Grid(self.bits, self.group, dtype)


VALUES: dict[str, type[Int8]] = {"int8": Int8, "int4": Int4}
