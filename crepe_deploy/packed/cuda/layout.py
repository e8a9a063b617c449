"""What the kernels read: derived from a stored pair at load, never stored in a file.

The values stay as they are stored. 2:4 gets its mask as bit planes: word (row, s, lane) holds, lowest first, the
nibbles of groups (8 s + t) 32 + lane for t = 0..7, so that one coalesced load serves eight steps and each lane finds
its own nibble by a shift. Everything else keeps the stored mask, read as 32-bit words, and rows that keep different
counts in different places also get where each word's values start.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from crepe_deploy.errors import CheckpointError, KernelError

CHUNK: Final = 32
GROUP: Final = 4
LANES: Final = 32
STEPS: Final = 8
PAD: Final = 4  # values past the end that the last group of a mask may read
DTYPES: Final = (torch.bfloat16, torch.float16)
_MOST_ELEMENTS: Final = 2**31 - 1  # kernels count in 32 bits


class Kind(IntEnum):
    """How a kernel finds a group's entries; the same numbers as in `kernels`."""

    DENSE = 0
    NIBBLE = 1
    MASK = 2
    ROWS = 3


@dataclass(frozen=True)
class DeviceWeight:
    """A packed weight `(rows, columns)` on one device.

    values   the weight's dtype, flat: kept values, row-major, ascending column (DENSE: all values); PAD more for
             MASK and ROWS
    meta     int32, flat: bit planes (NIBBLE), mask words (MASK, ROWS), empty (DENSE)
    offsets  int32, flat: where each mask word's values start (ROWS), else empty
    kept     values under each mask word (MASK), else 0
    """

    kind: Kind
    values: Tensor
    meta: Tensor
    offsets: Tensor
    rows: int
    columns: int
    kept: int

    @property
    def resident_bytes(self) -> int:
        """Bytes on the device."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.meta, self.offsets))


def misfit(rows: int, columns: int, dtype: torch.dtype) -> str | None:
    """Why no kernel here serves a weight of this size and dtype, or None."""
    if dtype not in DTYPES:
        return f"{dtype} has no GPU kernel; bfloat16 and float16 have"
    if columns % CHUNK or not rows or not columns:
        return f"{rows} x {columns} does not split into chunks of {CHUNK} columns"
    if rows * columns > _MOST_ELEMENTS:
        return f"{rows} x {columns} has more than {_MOST_ELEMENTS} elements"
    return None


def to_device(values: Tensor, mask_bytes: Tensor, device: torch.device | str, name: str = "weight") -> DeviceWeight:
    """The kernels' layout of a stored pair (values `(out, kept)`, or flat when ragged) on `device`.

    The inputs may be on any device and are not changed; values already there are shared, not copied. Raises
    CheckpointError naming the tensor when the pair does not fit together, KernelError when no kernel serves it.
    """
    if mask_bytes.dtype != torch.uint8 or mask_bytes.dim() != 2 or values.dim() not in (1, 2):
        raise CheckpointError(f"{name}: {mask_bytes.dtype} {tuple(mask_bytes.shape)} is not a packed mask")
    rows, columns = mask_bytes.shape[0], mask_bytes.shape[1] * 8
    if reason := misfit(rows, columns, values.dtype):
        raise KernelError(f"{name}: {reason}")
    if values.dim() == 2 and values.shape[0] != rows:
        raise CheckpointError(f"{name}: {values.shape[0]} rows of values, {rows} rows of mask")
    values, mask_bytes = values.to(device).contiguous(), mask_bytes.to(device).contiguous()
    words = mask_bytes.view(torch.int32)
    counts = population(words)
    total = int(counts.sum(dtype=torch.int64))
    if total != values.numel():
        raise CheckpointError(f"{name}: the mask keeps {total} entries, the values are {tuple(values.shape)}")
    flat, nothing = values.reshape(-1), words.new_empty(0)
    kept = int(counts[0, 0])
    if is_24(mask_bytes):
        return DeviceWeight(Kind.NIBBLE, flat, bit_planes(words).reshape(-1), nothing, rows, columns, 0)
    padded = torch.nn.functional.pad(flat, (0, PAD))
    if bool((counts == kept).all()):
        return DeviceWeight(Kind.MASK, padded, words.reshape(-1), nothing, rows, columns, kept)
    return DeviceWeight(Kind.ROWS, padded, words.reshape(-1), starts(counts), rows, columns, 0)


def dense_control(weight: Tensor) -> DeviceWeight:
    """An ordinary weight `(out, in)` for the same skeleton: the baseline that differs in nothing but sparsity."""
    nothing = torch.empty(0, dtype=torch.int32, device=weight.device)
    rows, columns = weight.shape
    return DeviceWeight(Kind.DENSE, weight.contiguous().reshape(-1), nothing, nothing, rows, columns, 0)


def population(words: Tensor) -> Tensor:
    """Bits set in each int32 word, int32 of the same shape."""
    low = words & 0x7FFFFFFF  # the sign bit apart, because >> copies it
    low = low - ((low >> 1) & 0x55555555)
    low = (low & 0x33333333) + ((low >> 2) & 0x33333333)
    low = (low + (low >> 4)) & 0x0F0F0F0F
    low = low + (low >> 8)
    return ((low + (low >> 16)) & 0x3F) + (words < 0).to(torch.int32)


def is_24(mask_bytes: Tensor) -> bool:
    """Whether every group of four columns keeps exactly two."""
    halves = [(mask_bytes >> shift) & 0x11 for shift in range(4)]  # bit s of each nibble, in place
    return bool((halves[0] + halves[1] + halves[2] + halves[3] == 0x22).all())


def bit_planes(words: Tensor) -> Tensor:
    """Mask words int32 `(rows, columns/32)` as bit planes, int32 `(rows, supers, 32)`; see the module."""
    rows, width = words.shape
    shifts = torch.arange(STEPS, dtype=torch.int32, device=words.device) * GROUP
    nibbles = ((words.unsqueeze(-1) >> shifts) & 15).reshape(rows, width * STEPS)
    supers = -(-nibbles.shape[1] // (LANES * STEPS))
    padded = torch.nn.functional.pad(nibbles, (0, supers * LANES * STEPS - nibbles.shape[1]))
    return _join(padded.view(rows, supers, STEPS, LANES).transpose(2, 3), shifts)


def words_of_planes(planes: Tensor, columns: int) -> Tensor:
    """The mask words that `bit_planes` was given."""
    shifts = torch.arange(STEPS, dtype=torch.int32, device=planes.device) * GROUP
    nibbles = ((planes.unsqueeze(-1) >> shifts) & 15).transpose(2, 3).reshape(planes.shape[0], -1)
    return _join(nibbles[:, : columns // GROUP].reshape(planes.shape[0], -1, STEPS), shifts)


def starts(counts: Tensor) -> Tensor:
    """Where each mask word's values start in the flat values: int32, flat."""
    flat = counts.reshape(-1)
    return (flat.cumsum(0) - flat).to(torch.int32)


def mask_words(weight: DeviceWeight) -> Tensor:
    """The mask words int32 `(rows, columns/32)` of a packed weight."""
    if weight.kind == Kind.NIBBLE:
        return words_of_planes(weight.meta.view(weight.rows, -1, LANES), weight.columns)
    return weight.meta.view(weight.rows, -1)


def restore(weight: DeviceWeight) -> tuple[Tensor, Tensor]:
    """The stored pair, on the device, bit-identical to what `to_device` was given; values flat when rows differ."""
    words = mask_words(weight)
    counts = population(words).sum(1)
    same = bool((counts == counts[0]).all())
    values = weight.values[: int(counts.sum(dtype=torch.int64))]
    return values.view(weight.rows, -1) if same else values, words.contiguous().view(torch.uint8).view(weight.rows, -1)


def _join(nibbles: Tensor, shifts: Tensor) -> Tensor:
    """int32 words of eight nibbles each (last dimension, lowest first)."""
    # Shifts into the sign bit are what is meant; a sum would be int64 and slow.
    joined = nibbles[..., 0].clone()
    for index in range(1, STEPS):
        joined |= nibbles[..., index] << shifts[index]
    return joined
