"""The tensors that stand for a packed weight, in every version of the format: names, sizes, checks, and the way back.

Versions 1 and 2 store values and a mask (`format.py`), version 3 codes, scales and, unless all is kept, a mask
(`coded.py`). Names are suffixes of the dense weight's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from crepe_deploy.errors import CheckpointError
from crepe_deploy.grid import Grid

from .coded import CODES_SUFFIX, SCALES_SUFFIX, Coded, decode, encode, validate_coded
from .config import PackedConfig
from .format import MASK_SUFFIX, VALUES_SUFFIX, mask_from_weight, pack, unpack, validate

SUFFIXES: Final = (VALUES_SUFFIX, CODES_SUFFIX, SCALES_SUFFIX, MASK_SUFFIX)


@dataclass(frozen=True)
class Part:
    """One stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, int]

    @property
    def size_bytes(self) -> int:
        return self.dtype.itemsize * self.shape[0] * self.shape[1]


def suffixes(config: PackedConfig, all_kept: bool) -> tuple[str, ...]:
    """The names of the parts of one weight."""
    if config.values is None:
        return VALUES_SUFFIX, MASK_SUFFIX
    return (CODES_SUFFIX, SCALES_SUFFIX) if all_kept else (CODES_SUFFIX, SCALES_SUFFIX, MASK_SUFFIX)


def parts(config: PackedConfig, dtype: torch.dtype, rows: int, columns: int) -> dict[str, Part]:
    """What a weight (rows, columns) of `dtype` becomes under its own `config`, by suffix."""
    n, m = config.geometry(columns)
    kept = columns // m * n
    mask = {MASK_SUFFIX: Part(torch.uint8, (rows, columns // 8))}
    if config.values is None:
        return {VALUES_SUFFIX: Part(dtype, (rows, kept)), **mask}
    grid = grid_of(config, dtype)
    codes = Part(torch.int8, (rows, kept)) if grid.bits == 8 else Part(torch.uint8, (rows, -(-kept // 2)))
    scales = Part(dtype, (rows, -(-columns // grid.width(columns))))
    return {CODES_SUFFIX: codes, SCALES_SUFFIX: scales, **(mask if n < m else {})}


def grid_of(config: PackedConfig, dtype: torch.dtype) -> Grid:
    """The grid of coded values of `dtype`."""
    assert config.values is not None
    return Grid(config.values.bits, config.values.group, dtype)


def stored(weight: Tensor, scales: Tensor | None, config: PackedConfig, name: str) -> dict[str, Tensor]:
    """The parts of a `weight` (out, in), by suffix; scales: of coded values.

    Raises PatternError where the weight has more non-zeros than its pattern, NumericalError where it is not on the
    grid of its scales, CheckpointError.
    """
    n, m = config.geometry(weight.shape[1])
    if scales is None:
        values, mask = pack(weight, mask_from_weight(weight, n, m, name), name)
        return {VALUES_SUFFIX: values, MASK_SUFFIX: mask}
    keep = None if n == m else mask_from_weight(weight, n, m, name)
    coded = encode(weight, scales, grid_of(config, weight.dtype), keep)
    found = {CODES_SUFFIX: coded.codes, SCALES_SUFFIX: coded.scales, MASK_SUFFIX: coded.mask}
    return {suffix: tensor for suffix, tensor in found.items() if tensor is not None}


def checked(found: Mapping[str, Tensor], config: PackedConfig, name: str) -> tuple[int, int]:
    """The shape (out, in) of the weight whose parts these are. Raises CheckpointError naming one that is wrong."""
    rows, columns = shape_of({suffix: tuple(tensor.shape) for suffix, tensor in found.items()}, config, name)
    n, m = config.geometry(columns)
    if config.values is None:
        validate(found[VALUES_SUFFIX], found[MASK_SUFFIX], n, m, columns, rows, name)
    else:
        coded = coded_of(found, columns)
        validate_coded(coded, grid_of(config, coded.scales.dtype), n, m, (rows, columns), name)
    return rows, columns


def shape_of(shapes: Mapping[str, tuple[int, ...]], config: PackedConfig, name: str) -> tuple[int, int]:
    """The dense (out, in) that the shapes of the parts stand for. Raises CheckpointError."""
    suffix = MASK_SUFFIX if MASK_SUFFIX in shapes else CODES_SUFFIX
    shape = shapes[suffix]
    if len(shape) != 2:
        what = suffix.strip("_")
        raise CheckpointError(f"{name}{suffix}: shape {shape}; a packed {what} has two dimensions")
    bits = 1 if suffix == MASK_SUFFIX or config.values is None else config.values.bits
    return shape[0], shape[1] * 8 // bits


def dense(found: Mapping[str, Tensor], config: PackedConfig, columns: int) -> Tensor:
    """The weight (out, in) of checked parts, to the bit as it was stored."""
    if config.values is None:
        return unpack(found[VALUES_SUFFIX], found[MASK_SUFFIX])
    coded = coded_of(found, columns)
    return decode(coded, grid_of(config, coded.scales.dtype))


def coded_of(found: Mapping[str, Tensor], columns: int) -> Coded:
    """Parts of version 3 as they are computed with."""
    return Coded(found[CODES_SUFFIX], found[SCALES_SUFFIX], found.get(MASK_SUFFIX), columns)
