"""Weights of the `crepe-nm` format, version 3, as pure functions of tensors: codes and scales, with or without a mask.

A weight `(out, in)` on a grid (`crepe_deploy/grid.py`), of which each row keeps `kept` entries, is stored as

    codes   8 bits: int8 (out, kept)   4 bits: uint8 (out, ceil(kept/2)), two's complement, the lower column in the
                                       low half of a byte; a last half without a code is 0
    scales  the model's dtype (out, ceil(in/group)), finite and above 0; one column where the row is one group
    mask    as in version 1 (`format.py`), of any N:M; none where everything is kept

Codes stand in the order of the kept columns. Groups count columns of the dense weight and are whole multiples of 32
wide, so that every shard of columns has whole bytes of mask and knows its scales.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crepe_deploy.errors import CheckpointError, ConfigError
from crepe_deploy.grid import Grid, codes_of

from .config import COLUMN_MULTIPLE
from .format import DTYPES, MASK_SUFFIX, check_geometry, first_wrong_group, unpack_mask

CODES_SUFFIX: Final = "_codes"
SCALES_SUFFIX: Final = "_scales"


@dataclass(frozen=True)
class Coded:
    """One stored weight. mask: bytes, None where all is kept. offset: columns of its first group that a shard lacks."""

    codes: Tensor
    scales: Tensor
    mask: Tensor | None
    in_features: int
    offset: int = 0


def check_grid(grid: Grid) -> None:
    """Raise ConfigError where a grid's groups cannot be sharded."""
    if grid.group is not None and grid.group % COLUMN_MULTIPLE:
        raise ConfigError(f"groups of {grid.group} columns; packing needs a multiple of {COLUMN_MULTIPLE}")


def encode(weight: Tensor, scales: Tensor, grid: Grid, mask: Tensor | None) -> Coded:
    """Store `weight` (out, in), on the `grid` with `scales`, under the bool `mask` (out, in) or None for all.

    Raises ConfigError for groups that cannot be sharded, NumericalError for a weight off the grid, CheckpointError
    where rows keep different counts or something outside the mask is not 0, PatternError for columns that do not pack.
    """
    check_grid(grid)
    rows, columns = weight.shape
    check_geometry(1, columns, columns)
    codes = codes_of(weight, scales, grid).cpu()
    stored = scales.to(grid.dtype).cpu().contiguous()
    if mask is None:
        return Coded(_packed(codes, grid.bits), stored, None, columns)
    keep = mask.cpu()
    counts = keep.sum(1)
    if rows and bool((counts != counts[0]).any()):
        raise CheckpointError(f"weight: rows keep from {int(counts.min())} to {int(counts.max())} entries")
    if codes[~keep].any():
        raise CheckpointError("weight: an entry outside the mask is not 0")
    bits = torch.from_numpy(np.packbits(keep.contiguous().numpy(), axis=1, bitorder="little"))
    return Coded(_packed(codes[keep].view(rows, -1), grid.bits), stored, bits, columns)


def decode(coded: Coded, grid: Grid) -> Tensor:
    """The dense weight (out, in) in the grid's dtype, to the bit as it was encoded.

    Raises CheckpointError where codes and mask disagree.
    """
    rows, spread = len(coded.scales), _spread(coded, grid)
    if coded.mask is None:
        codes = _unpacked(coded.codes, grid.bits, coded.in_features)
    else:
        counts = np.bitwise_count(coded.mask.contiguous().numpy())
        packed = _unpacked(coded.codes, grid.bits, int(counts[0].sum()) if rows else 0)
        if (bits := int(counts.sum(dtype=np.int64))) != packed.numel():
            raise CheckpointError(f"packed weight: {packed.numel()} codes for {bits} mask bits")
        codes = _placed(packed, coded.mask, counts)
    return (codes.float() * spread).to(grid.dtype)


def validate_coded(coded: Coded, grid: Grid, n: int, m: int, shape: tuple[int, int], name: str) -> None:
    """Check what was read from a file for weight `name` of `shape` (out, in) that keeps `n` of `m`.

    Raises CheckpointError naming the tensor for a wrong dtype, shape, mask, scale or padding, ConfigError and
    PatternError where the grid or `n:m` cannot be stored at that size.
    """
    rows, columns = shape
    check_grid(grid)
    if (coded.mask is None) != (n == m):
        raise CheckpointError(f"{name}{MASK_SUFFIX}: {'missing' if coded.mask is None else 'there'} for {n}:{m}")
    check_geometry(n, m, columns, name)
    kept = columns // m * n
    stored = (torch.int8, kept) if grid.bits == 8 else (torch.uint8, -(-kept // 2))
    expected = [(CODES_SUFFIX, coded.codes, stored[0], (rows, stored[1]))]
    expected.append((SCALES_SUFFIX, coded.scales, grid.dtype, (rows, -(-columns // grid.width(columns)))))
    if grid.dtype not in DTYPES:
        raise CheckpointError(f"{name}{SCALES_SUFFIX}: dtype {grid.dtype}; scales are bf16, fp16 or fp32")
    if coded.mask is not None:
        expected.append((MASK_SUFFIX, coded.mask, torch.uint8, (rows, columns // 8)))
    for suffix, tensor, dtype, size in expected:
        if tensor.dtype != dtype or tuple(tensor.shape) != size:
            raise CheckpointError(f"{name}{suffix}: {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {size}")
    if not bool((coded.scales.isfinite() & (coded.scales > 0)).all()):
        raise CheckpointError(f"{name}{SCALES_SUFFIX}: a scale is not a finite number above 0")
    if grid.bits == 4 and kept % 2 and bool((coded.codes[:, -1] >> 4).any()):
        raise CheckpointError(f"{name}{CODES_SUFFIX}: the last half byte of a row is not 0")
    wrong = None if coded.mask is None else first_wrong_group(coded.mask.numpy(), n, m)
    if wrong is not None:
        raise CheckpointError(f"{name}{MASK_SUFFIX}: row {wrong[0]}, group {wrong[1]} does not keep exactly {n} of {m}")


def coded_rows(coded: Coded, start: int, stop: int) -> Coded:
    """Rows `[start, stop)`, a shard along the outputs."""
    mask = None if coded.mask is None else coded.mask[start:stop]
    return Coded(coded.codes[start:stop], coded.scales[start:stop], mask, coded.in_features, coded.offset)


def coded_columns(coded: Coded, grid: Grid, start: int, stop: int) -> Coded:
    """Columns `[start, stop)`, multiples of 32 (and of M): a shard along the inputs, with the scales that it needs.

    Raises CheckpointError for other bounds, and where rows keep different counts in the slice.
    """
    if not 0 <= start < stop <= coded.in_features or start % COLUMN_MULTIPLE or stop % COLUMN_MULTIPLE:
        raise CheckpointError(f"columns {start} to {stop} of {coded.in_features} are not a slice in multiples of 32")
    width = coded.in_features + coded.offset if grid.group is None else grid.group
    first, end = (start + coded.offset) // width, -(-(stop + coded.offset) // width)
    scales, offset = coded.scales[:, first:end].contiguous(), (start + coded.offset) % width
    if coded.mask is None:
        codes = _unpacked(coded.codes, grid.bits, coded.in_features)[:, start:stop]
        return Coded(_packed(codes, grid.bits), scales, None, stop - start, offset)
    keep = unpack_mask(coded.mask)
    before, inside = keep[:, :start].sum(1), keep[:, start:stop].sum(1)
    if len(keep) and bool((before != before[0]).any() | (inside != inside[0]).any()):
        raise CheckpointError(f"columns {start} to {stop}: rows keep different counts there")
    left, kept = (int(counts[0]) if len(keep) else 0 for counts in (before, inside))
    codes = _unpacked(coded.codes, grid.bits, int(keep[0].sum()) if len(keep) else 0)[:, left : left + kept]
    return Coded(
        _packed(codes, grid.bits), scales, coded.mask[:, start // 8 : stop // 8].contiguous(), stop - start, offset
    )


def _spread(coded: Coded, grid: Grid) -> Tensor:
    """The scale of every entry, fp32 (out, in)."""
    end = coded.offset + coded.in_features
    return coded.scales.float().repeat_interleave(grid.group or end, dim=1)[:, coded.offset : end]


def _placed(packed: Tensor, mask: Tensor, counts: npt.NDArray[np.uint8]) -> Tensor:
    """Codes (out, kept) at their columns, int8 (out, in), 0 between; counts: of the bits of each byte of the mask.

    Taken by index without a branch, for a mask is noise that no branch prediction follows.
    """
    index = np.int32 if mask.numel() < 1 << 28 else np.int64
    before = counts.cumsum(dtype=index) - counts.ravel()
    taken = before[:, None] + _ranks().astype(index)[mask.contiguous().numpy().ravel()]
    codes = torch.nn.functional.pad(packed.reshape(-1), (0, 1)).index_select(0, torch.from_numpy(taken).view(-1))
    return codes.view(len(mask), -1).mul_(unpack_mask(mask))


@functools.cache
def _ranks() -> npt.NDArray[np.uint8]:
    """(256, 8): how many lower bits of a byte are set, by byte and bit."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return (bits.cumsum(axis=1, dtype=np.uint8) - bits).astype(np.uint8)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """int8 codes (out, kept) as they are stored."""
    if bits == 8:
        return codes.contiguous()
    halves = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).view(torch.uint8) & 15
    return halves[:, ::2] | (halves[:, 1::2] << 4)


def _unpacked(stored: Tensor, bits: int, kept: int) -> Tensor:
    """The int8 codes (out, kept)."""
    if bits == 8:
        return stored
    halves = torch.stack((stored & 15, stored >> 4), dim=2).flatten(1)[:, :kept].to(torch.int8)
    return (halves ^ 8) - 8
