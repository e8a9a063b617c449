"""The kernels' own layout of a packed weight: derived at load, never stored, reversible, of the same size.

Rows go in blocks of 4 and columns in chunks of 32; for each block, each chunk and each row there is one 32-bit mask
word in `mask` and the values kept under it in `values` (see `cpu/nm.h`). One front-to-back stream serves every
pattern, so 2:4, 16:32 and unstructured rows cost the same.
"""

from __future__ import annotations

import ctypes
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crepe_deploy.errors import CheckpointError, KernelError

from .config import COLUMN_MULTIPLE
from .format import DTYPES, as_bits, check_pair
from .native import Native, backend

ROWS: Final = 4
CHUNK: Final = COLUMN_MULTIPLE
PAD: Final = ROWS * CHUNK


class Prepared(NamedTuple):
    """A packed weight `(out_features, in_features)` in kernel layout, on the CPU.

    values   the weight's dtype, flat: all kept values, then PAD elements nothing refers to
    mask     int32, flat: ceil(out/4) * (in/32) * 4 words
    offsets  int64 (ceil(out/4) + 1): where each block's values start
    """

    values: Tensor
    mask: Tensor
    offsets: Tensor
    out_features: int
    in_features: int


def prepare(values: Tensor, mask_bytes: Tensor, name: str = "weight") -> Prepared:
    """Turn a stored pair (see `format`; flat ragged values too) into kernel layout; the inputs are not changed.

    Raises CheckpointError naming the tensor when dtypes, shapes or populations do not fit together, KernelError when
    the tensors are not on the CPU.
    """
    _check_stored(values, mask_bytes, name)
    rows, columns = mask_bytes.shape[0], mask_bytes.shape[1] * 8
    counts = np.bitwise_count(mask_bytes.contiguous().numpy()).sum(axis=1, dtype=np.int64)
    row_start = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
    if row_start[-1] != values.numel() or (values.dim() == 2 and (counts != values.shape[1]).any()):
        raise CheckpointError(
            f"{name}: the mask keeps {row_start[-1]} entries, from {counts.min(initial=0)} to "
            f"{counts.max(initial=0)} in a row; the values are {tuple(values.shape)}"
        )
    blocks = -(-rows // ROWS)
    offsets = row_start[np.minimum(np.arange(blocks + 1) * ROWS, rows)]
    native = backend().native
    total = values.numel() + PAD
    prepared = Prepared(
        values.new_empty(total),
        torch.empty(blocks * ROWS * (columns // CHUNK), dtype=torch.int32),
        torch.from_numpy(offsets),
        rows,
        columns,
    )
    stored = (values.contiguous(), mask_bytes.contiguous())
    if native is None:
        _to_kernel_numpy(stored, prepared)
    else:
        native.library.crepe_huge_pages(prepared.values.data_ptr(), total * values.element_size())
        _relayout(native, stored, row_start, prepared, to_kernel=True)
    prepared.values[values.numel() :] = 0
    return prepared


def restore(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """The stored pair of a prepared weight, bit-identical to what `prepare` was given; values flat when ragged.

    Raises KernelError when the prepared tensors are damaged.
    """
    rows, columns = prepared.out_features, prepared.in_features
    check(prepared)
    words = prepared.mask.numpy().view(np.uint32).reshape(-1, columns // CHUNK, ROWS)
    counts = np.bitwise_count(words).sum(axis=1, dtype=np.int64).reshape(-1)[:rows]
    row_start = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
    if row_start[-1] + PAD != prepared.values.numel():
        raise KernelError("a prepared weight's masks do not match its values; it is damaged")
    values = prepared.values.new_empty(int(row_start[-1]))
    mask_bytes = torch.empty((rows, columns // 8), dtype=torch.uint8)
    native = backend().native
    if native is None:
        _to_stored_numpy(prepared, (values, mask_bytes))
    else:
        offsets = row_start[np.minimum(np.arange(len(prepared.offsets)) * ROWS, rows)]
        clean = prepared._replace(offsets=torch.from_numpy(offsets))
        _relayout(native, (values, mask_bytes), row_start, clean, to_kernel=False)
    if rows and (counts == counts[0]).all():
        values = values.view(rows, int(counts[0]))
    return values, mask_bytes


def expand(prepared: Prepared) -> Tensor:
    """The dense weight `(out, in)`, bit-identical at kept entries, +0.0 elsewhere; in plain torch and numpy.

    Raises KernelError when the prepared tensors are damaged.
    """
    check(prepared)
    kept = _kernel_mask(prepared)
    count = int(np.count_nonzero(kept))
    if count + PAD != prepared.values.numel():
        raise KernelError("a prepared weight's masks do not match its values; it is damaged")
    bits = as_bits(prepared.values)
    dense = np.zeros(kept.shape, dtype=bits.dtype)
    dense[kept] = bits[:count]
    in_order = np.ascontiguousarray(dense.transpose(0, 2, 1, 3)).reshape(-1, prepared.in_features)
    return torch.from_numpy(in_order[: prepared.out_features]).view(prepared.values.dtype)


def check(prepared: Prepared) -> None:
    """Raise KernelError unless the tensors' dtypes, devices and sizes fit together."""
    values, mask, offsets, rows, columns = prepared
    blocks = -(-rows // ROWS)
    if any(t.device.type != "cpu" or not t.is_contiguous() or t.dim() != 1 for t in (values, mask, offsets)):
        raise KernelError("a prepared weight's tensors must be flat, contiguous and on the CPU")
    if values.dtype not in DTYPES or mask.dtype != torch.int32 or offsets.dtype != torch.int64:
        raise KernelError(f"a prepared weight has dtypes {values.dtype}, {mask.dtype}, {offsets.dtype}")
    if columns <= 0 or columns % CHUNK or rows < 0:
        raise KernelError(f"a prepared weight cannot be {rows} x {columns}")
    if mask.numel() != blocks * ROWS * (columns // CHUNK) or offsets.numel() != blocks + 1 or values.numel() < PAD:
        raise KernelError(f"a prepared weight's tensors do not fit {rows} x {columns}")


def _check_stored(values: Tensor, mask_bytes: Tensor, name: str) -> None:
    if values.device.type != "cpu" or mask_bytes.device.type != "cpu":
        raise KernelError(f"{name}: is on {values.device}; the packed kernels run on the CPU")
    check_pair(values, mask_bytes, name)
    if not mask_bytes.shape[1]:
        raise CheckpointError(f"{name}: the mask has no columns")


def _relayout(
    native: Native,
    stored: tuple[Tensor, Tensor],
    row_start: npt.NDArray[np.int64],
    prepared: Prepared,
    *,
    to_kernel: bool,
) -> None:
    values, mask_bytes = stored
    aligned = mask_bytes if mask_bytes.data_ptr() % 4 == 0 else mask_bytes.clone()
    pointers = (values, aligned, torch.from_numpy(row_start), prepared.values, prepared.mask, prepared.offsets)
    row = native.library.crepe_relayout(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in pointers),
        prepared.out_features,
        prepared.in_features,
        values.element_size(),
        int(to_kernel),
    )
    if row >= 0:
        raise KernelError(f"row {row} of a packed weight keeps another count than its values")


def _kernel_mask(prepared: Prepared) -> npt.NDArray[np.bool_]:
    """bool (blocks, chunks, ROWS, CHUNK): which columns are kept, in kernel order."""
    words = np.ascontiguousarray(prepared.mask.numpy()).view(np.uint8)
    bits = np.unpackbits(words, bitorder="little").view(np.bool_)
    return bits.reshape(-1, prepared.in_features // CHUNK, ROWS, CHUNK)


def _to_kernel_numpy(stored: tuple[Tensor, Tensor], prepared: Prepared) -> None:
    values, mask_bytes = stored
    rows, columns = prepared.out_features, prepared.in_features
    kept = np.zeros((-(-rows // ROWS) * ROWS, columns), dtype=np.bool_)
    kept[:rows] = np.unpackbits(mask_bytes.numpy(), axis=1, bitorder="little").view(np.bool_)
    dense = np.zeros(kept.shape, dtype=as_bits(values).dtype)
    dense[kept] = as_bits(values).reshape(-1)
    shape = (-1, ROWS, columns // CHUNK, CHUNK)
    kept, dense = (np.ascontiguousarray(a.reshape(shape).transpose(0, 2, 1, 3)) for a in (kept, dense))
    as_bits(prepared.values)[: values.numel()] = dense[kept]
    prepared.mask.copy_(torch.from_numpy(np.packbits(kept.reshape(-1), bitorder="little").view(np.int32)))


def _to_stored_numpy(prepared: Prepared, stored: tuple[Tensor, Tensor]) -> None:
    values, mask_bytes = stored
    kept = np.ascontiguousarray(_kernel_mask(prepared).transpose(0, 2, 1, 3)).reshape(-1, prepared.in_features)
    kept = kept[: prepared.out_features]
    as_bits(values)[:] = as_bits(expand(prepared))[kept]
    mask_bytes.copy_(torch.from_numpy(np.packbits(kept, axis=1, bitorder="little")))
