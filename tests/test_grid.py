"""Quantising under a mask against a slow loop; what a sweep gains; codes that come back from what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError, NumericalError
from crepe_deploy.grid import Grid, codes_of, round_to_nearest
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.methods.sparsegpt import Factor, factorise, sweep_codes
from crepe_deploy.select import select

from .pruning.methods.reference import gptq

GRIDS = [Grid(bits, group, dtype) for bits, group in ((4, 32), (4, 24), (4, 128), (8, None), (8, 64))
         for dtype in (torch.bfloat16, torch.float16, torch.float32)]  # fmt: skip
MASKS = ["dense", "2:4", "16:32"]


def layer(rows: int = 24, columns: int = 160, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weight (rows, columns) and a Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator) / 50, inputs.T @ inputs


def masked(weight: Tensor, kind: str) -> Tensor:
    if kind == "dense":
        return torch.ones_like(weight, dtype=torch.bool)
    kept, width = map(int, kind.split(":"))
    return select(weight.abs(), NM(kept, width))


def loss(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    change = (weight - other).double()
    return float((change @ gram.double() * change).sum())


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_stored_gives_its_codes_back(grid: Grid, kind: str) -> None:
    weight, gram = layer()
    mask = masked(weight, kind)
    start = weight * mask
    for found in (round_to_nearest(start, mask, grid), sweep_codes(start, mask, factorise(gram, 0.01, 1), grid, 128)):
        stored, scales = found.weight.to(grid.dtype), found.scales.to(grid.dtype)
        assert torch.equal(stored.float(), found.weight)
        assert torch.equal(scales.float(), found.scales)
        width = grid.width(weight.shape[1])
        assert scales.shape == (len(weight), -(-weight.shape[1] // width))
        codes = codes_of(stored, scales, grid)
        assert codes.int().abs().max() <= 2 ** (grid.bits - 1)
        spread = scales.float().repeat_interleave(width, 1)[:, : weight.shape[1]]
        assert torch.equal((codes.float() * spread).to(grid.dtype), stored)
        assert not codes[~mask].any()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("grid", [GRIDS[2], Grid(4, 48, torch.bfloat16), Grid(8, None, torch.float32)], ids=str)
def test_the_sweep_is_the_slow_loop(grid: Grid, kind: str) -> None:
    """Scales are the sweep's own, so that a tie in their search decides nothing; then every column by hand."""
    weight, gram = layer(rows=6, columns=96)
    mask = masked(weight, kind)
    found = sweep_codes(weight * mask, mask, factorise(gram, 0.01, 1), grid, 32)
    expected = gptq(weight * mask, mask, gram, found.scales, grid.bits, grid.width(96), grid.dtype, damping=0.01)
    differing = (found.weight.double() - expected).abs() > 1e-6
    assert differing.double().mean() < 0.01  # fp32 against fp64: a weight between two codes may fall on either side


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_without_correlation_the_sweep_is_round_to_nearest(grid: Grid, kind: str) -> None:
    weight, _ = layer()
    mask = masked(weight, kind)
    plain = Factor(torch.eye(160), torch.zeros(160, dtype=torch.bool), 0.0)
    swept, rounded = sweep_codes(weight * mask, mask, plain, grid, 128), round_to_nearest(weight, mask, grid)
    assert torch.equal(swept.weight, rounded.weight)
    assert torch.equal(swept.scales, rounded.scales)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[6], Grid(8, None, torch.float32)], ids=str)
def test_the_sweep_loses_less_than_rounding(grid: Grid, kind: str, seed: int) -> None:
    weight, gram = layer(seed=seed)
    mask = masked(weight, kind)
    start = weight * mask
    factor = factorise(gram, 0.01, 1)
    swept, rounded = sweep_codes(start, mask, factor, grid, 128), round_to_nearest(start, mask, grid)
    assert loss(start, swept.weight, gram) < loss(start, rounded.weight, gram)


def test_rounding_is_to_the_nearest_code_of_the_best_scale() -> None:
    weight, _ = layer()
    mask = masked(weight, "2:4")
    grid = Grid(4, 32, torch.float32)
    found = round_to_nearest(weight, mask, grid)
    spread = found.scales.repeat_interleave(32, 1)
    inside = mask & ((weight / spread).abs() < 7.5)
    assert ((weight - found.weight).abs()[inside] <= spread[inside] * (0.5 + 1e-5)).all()
    largest = (weight * mask).abs().view(24, 5, 32).amax(-1)
    plain = (largest / 7).repeat_interleave(32, 1)
    unclipped = (weight * mask / plain).round() * plain
    errors = [((weight * mask - other) ** 2).view(24, 5, 32).sum(-1) for other in (found.weight, unclipped)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()


def test_groups_of_zeros_and_of_tiny_weights() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.zeros(2, 64)
        weight[1, :32] = 1e-7
        found = round_to_nearest(weight, weight != 0, Grid(4, 32, dtype))
        assert (found.scales > 0).all()
        assert found.weight.isfinite().all()
        assert codes_of(found.weight.to(dtype), found.scales, Grid(4, 32, dtype))[0].abs().max() == 0


def test_arguments_are_left_alone() -> None:
    weight, gram = layer()
    mask = masked(weight, "2:4")
    before = weight.clone(), mask.clone()
    sweep_codes(weight, mask, factorise(gram, 0.01, 1), Grid(4, 32, torch.bfloat16), 128)
    round_to_nearest(weight, mask, Grid(4, 32, torch.bfloat16))
    assert torch.equal(weight, before[0])
    assert torch.equal(mask, before[1])


def test_what_cannot_work_is_refused() -> None:
    weight, _ = layer()
    with pytest.raises(ConfigError, match="3 bits; there are 4 and 8"):
        Grid(3, None, torch.bfloat16)
    with pytest.raises(ConfigError, match="group is 0"):
        Grid(4, 0, torch.bfloat16)
    with pytest.raises(NumericalError, match="not on the grid"):
        codes_of(weight, torch.ones(24, 5), Grid(4, 32, torch.float32))
    weight[3, 5] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        round_to_nearest(weight, torch.ones_like(weight, dtype=torch.bool), Grid(4, 32, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_code_comes_back_for_every_scale_that_there_is(dtype: torch.dtype) -> None:
    """All positive finite scales of the dtype, the subnormal ones too, by all codes whose weight the dtype holds."""
    last = 0x7F7F if dtype == torch.bfloat16 else 0x7BFF
    scales = torch.arange(1, last + 1, dtype=torch.int16).view(dtype).float().unsqueeze(1)
    codes = torch.arange(-128, 128, dtype=torch.float32)
    weights = (codes * scales).to(dtype)
    found = Grid(8, None, dtype).codes(weights, scales)
    assert torch.equal(found.float()[weights.isfinite()], codes.expand_as(weights)[weights.isfinite()])
