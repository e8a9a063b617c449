"""Codes and scales as they are stored: to the bit and back, counted in bytes, sharded, and refused when spoilt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crepe_deploy.errors import CheckpointError, ConfigError, NumericalError, PatternError
from crepe_deploy.grid import Grid, round_to_nearest
from crepe_deploy.packed.coded import Coded, check_grid, coded_columns, coded_rows, decode, encode, validate_coded
from crepe_deploy.pattern import NM
from crepe_deploy.select import select

BF16 = torch.bfloat16
GRIDS = [Grid(4, 32, BF16), Grid(4, 128, torch.float16), Grid(4, 96, torch.float32), Grid(8, None, BF16),
         Grid(4, None, BF16), Grid(8, 64, torch.float32)]  # fmt: skip
PATTERNS = [(2, 4), (16, 32), (13, 32), (1, 1)]


def stored(grid: Grid, n: int, m: int, rows: int = 6, columns: int = 160) -> tuple[Tensor, Coded]:
    """A weight on the grid that keeps `n` of `m`, and how it is stored."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 50
    mask = select(weight.abs(), NM(n, m)) if n < m else torch.ones_like(weight, dtype=torch.bool)
    found = round_to_nearest(weight, mask, grid)
    dense = found.weight.to(grid.dtype)
    return dense, encode(dense, found.scales, grid, mask if n < m else None)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_weight_comes_back_to_the_bit(grid: Grid, n: int, m: int) -> None:
    dense, coded = stored(grid, n, m)
    validate_coded(coded, grid, n, m, (6, 160), "w")
    back = decode(coded, grid)
    assert back.dtype == grid.dtype
    assert torch.equal(back, dense)
    assert int((coded.codes != 0).sum()) > 0


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_shards_are_slices_of_the_weight(grid: Grid, n: int, m: int) -> None:
    dense, coded = stored(grid, n, m)
    assert torch.equal(decode(coded_rows(coded, 2, 5), grid), dense[2:5])
    for start, stop in ((0, 32), (32, 160), (64, 128), (96, 160)):
        shard = coded_columns(coded, grid, start, stop)
        assert torch.equal(decode(shard, grid), dense[:, start:stop])
        assert torch.equal(decode(coded_columns(shard, grid, 0, 32), grid), dense[:, start : start + 32])
        assert torch.equal(
            decode(coded_columns(shard, grid, stop - start - 32, stop - start), grid), dense[:, stop - 32 : stop]
        )


@pytest.mark.parametrize(
    ("grid", "n", "m", "bits"),
    [(Grid(4, 128, BF16), 16, 32, 3.125), (Grid(8, None, BF16), 16, 32, 5.016), (Grid(4, 128, BF16), 1, 1, 4.125),
     (Grid(8, None, BF16), 2, 4, 5.016), (Grid(4, 128, BF16), 12, 32, 2.625)],
)  # fmt: skip
def test_bytes_a_weight(grid: Grid, n: int, m: int, bits: float) -> None:
    _, coded = stored(grid, n, m, rows=8, columns=1024)
    tensors = [tensor for tensor in (coded.codes, coded.scales, coded.mask) if tensor is not None]
    assert sum(tensor.nbytes for tensor in tensors) * 8 / (8 * 1024) == pytest.approx(bits, abs=0.001)


SPOILT: dict[str, tuple[Callable[[Coded], Coded], str]] = {
    "codes cut": (lambda c: replace(c, codes=c.codes[:, 1:]), "w_codes"),
    "codes of another kind": (lambda c: replace(c, codes=c.codes.float()), "w_codes"),
    "scales NaN": (lambda c: replace(c, scales=c.scales * torch.nan), "w_scales: a scale is not a finite number"),
    "scales infinite": (lambda c: replace(c, scales=c.scales / 0), "w_scales: a scale is not a finite number"),
    "scales zero": (lambda c: replace(c, scales=c.scales * 0), "w_scales: a scale is not a finite number"),
    "scales negative": (lambda c: replace(c, scales=-c.scales), "w_scales: a scale is not a finite number"),
    "scales of another kind": (lambda c: replace(c, scales=c.scales.float()), "w_scales: torch.float32"),
    "scales missing": (lambda c: replace(c, scales=c.scales[:, 1:]), "w_scales"),
    "mask missing": (lambda c: replace(c, mask=None), "w_mask: missing for 13:32"),
    "mask full": (lambda c: replace(c, mask=torch.full((6, 20), 255, dtype=torch.uint8)), "w_mask: row 0, group 0"),
    "padding": (lambda c: replace(c, codes=c.codes | 240), "w_codes: the last half byte of a row"),
}  # fmt: skip


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_is_spoilt_is_refused_by_name(spoilt: str) -> None:
    grid = Grid(4, 32, BF16)
    _, coded = stored(grid, 13, 32)
    spoil, message = SPOILT[spoilt]
    with pytest.raises(CheckpointError, match=message):
        validate_coded(spoil(coded), grid, 13, 32, (6, 160), "w")


def test_what_cannot_be_stored_is_refused() -> None:
    grid = Grid(4, 32, BF16)
    dense, coded = stored(grid, 2, 4)
    with pytest.raises(ConfigError, match="groups of 48 columns"):
        check_grid(Grid(4, 48, BF16))
    with pytest.raises(CheckpointError, match="multiples of 32"):
        coded_columns(coded, grid, 16, 64)
    with pytest.raises(CheckpointError, match="rows keep from 0 to 160"):
        encode(dense, coded.scales, grid, torch.arange(6)[:, None].expand(6, 160) > 0)
    with pytest.raises(CheckpointError, match="outside the mask is not 0"):
        encode(dense, coded.scales, grid, torch.zeros(6, 160, dtype=torch.bool))
    with pytest.raises(NumericalError, match="not on the grid"):
        encode(dense + 1e-3, coded.scales, grid, None)
    with pytest.raises(PatternError, match="33 input columns"):
        encode(torch.zeros(6, 33), torch.ones(6, 2), grid, None)
