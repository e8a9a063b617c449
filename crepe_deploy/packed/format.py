"""The `crepe-nm` checkpoint format, version 1, as pure functions of tensors.

A weight `(out, in)` of which every group of M consecutive columns keeps exactly N entries is stored as

    values  same dtype  (out, in*N/M)   kept entries, row-major, ascending column
    mask    uint8       (out, in/8)     bit j%8 (least significant first) of byte j//8 set = column j kept

M is at most 32, or equal to `in` (unstructured: exactly N kept in each row). A kept entry may be 0.0 or -0.0: the
mask decides, not the value. A column slice of an unstructured weight keeps a different count in each row; its
values are then one flat tensor, rows one after the other ("ragged"), which is never stored in a file.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crepe_deploy.errors import CheckpointError, PatternError
from crepe_deploy.pattern import MAX_GROUP

from .config import COLUMN_MULTIPLE

VALUES_SUFFIX: Final = "_values"
MASK_SUFFIX: Final = "_mask"
DTYPES: Final[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16, torch.float32)

BITS: Final = {2: torch.int16, 4: torch.int32}  # the integer that holds an entry's bits, by its bytes


def check_geometry(n: int, m: int, in_features: int, name: str = "weight") -> None:
    """Raise PatternError naming the tensor unless N:M can be stored for rows of `in_features` columns.

    `m <= 32`, or `m == in_features` for unstructured rows; `in_features` is a multiple of 32 and of `m`.
    """
    if in_features <= 0 or in_features % COLUMN_MULTIPLE:
        raise PatternError(f"{name}: {in_features} input columns; packing needs a multiple of {COLUMN_MULTIPLE}")
    if not 1 <= n <= m or (m > MAX_GROUP and m != in_features):
        raise PatternError(
            f"{name}: pattern {n}:{m} cannot be packed; N:M needs 1 <= N <= M, and M <= {MAX_GROUP} or M equal to "
            f"the {in_features} input columns"
        )
    if in_features % m:
        raise PatternError(f"{name}: {in_features} input columns do not split into groups of {m}")


def mask_from_weight(weight: Tensor, n: int, m: int, name: str = "weight") -> Tensor:
    """The bool mask `(out, in)` (True = kept) of a dense-with-zeros `weight`, exactly `n` in each group of `m`.

    Non-zeros are kept; a group with fewer than `n` is topped up with its -0.0s, then with its lowest-index zeros.
    Raises PatternError naming the tensor when a group has more than `n` non-zeros.
    """
    _check_dense(weight, name)
    columns = weight.shape[1]
    check_geometry(n, m, columns, name)
    mask = weight != 0
    counts = mask.view(-1, m).sum(-1, dtype=torch.int32)
    if bool((counts > n).any()):
        worst = int(counts.argmax())
        row, group = divmod(worst, columns // m)
        raise PatternError(
            f"{name}: row {row}, columns {group * m} to {group * m + m - 1} have {int(counts[worst])} non-zeros, "
            f"more than the {n} that pattern {n}:{m} keeps"
        )
    short = torch.nonzero(counts < n).squeeze(-1)
    if short.numel():
        groups = weight.reshape(-1, m)[short]
        rank = (groups != 0).to(torch.int8) * 2 + ((groups == 0) & torch.signbit(groups)).to(torch.int8)
        keep = rank.argsort(dim=-1, descending=True, stable=True)[:, :n]
        mask.view(-1, m)[short] = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, keep, True)
    return mask


def pack(weight: Tensor, mask: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Pack `weight` `(out, in)` under the bool `mask` `(out, in)` into `(values, mask_bytes)`; see the module.

    Both results are new, contiguous, on the CPU. Raises PatternError when rows keep different counts (then no N:M
    fits), CheckpointError for a wrong dtype or shape.
    """
    _check_dense(weight, name)
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise CheckpointError(f"{name}: the mask is {mask.dtype} {tuple(mask.shape)}, not bool {tuple(weight.shape)}")
    rows, columns = weight.shape
    check_geometry(1, columns, columns, name)
    bits = np.packbits(mask.cpu().contiguous().numpy(), axis=1, bitorder="little")
    counts = np.bitwise_count(bits).sum(axis=1, dtype=np.int64)
    if rows and (counts != counts[0]).any():
        raise PatternError(
            f"{name}: rows keep from {counts.min()} to {counts.max()} entries; every row must keep as many"
        )
    kept = int(counts[0]) if rows else 0
    values = as_bits(weight)[mask.cpu().contiguous().numpy()].reshape(rows, kept)
    return torch.from_numpy(values).view(weight.dtype), torch.from_numpy(bits)


def unpack(values: Tensor, mask_bytes: Tensor) -> Tensor:
    """The dense weight `(out, in)` of a packed pair: bit-identical at kept entries, +0.0 elsewhere.

    `values` is `(out, kept)` or flat (ragged). Raises CheckpointError when the counts of bits and values differ.
    """
    check_pair(values, mask_bytes, "weight")
    mask = unpack_mask(mask_bytes).numpy()
    if int(np.count_nonzero(mask)) != values.numel():
        raise CheckpointError(f"packed weight: {values.numel()} values for {np.count_nonzero(mask)} mask bits")
    flat = as_bits(values).reshape(-1)
    dense = np.zeros(mask.shape, dtype=flat.dtype)
    dense[mask] = flat
    return torch.from_numpy(dense).view(values.dtype)


def unpack_mask(mask_bytes: Tensor) -> Tensor:
    """The bool mask `(out, in)` of `mask_bytes`, uint8 `(out, in/8)`."""
    bits = np.unpackbits(mask_bytes.cpu().contiguous().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


def validate(
    values: Tensor, mask_bytes: Tensor, n: int, m: int, in_features: int, out_features: int, name: str
) -> None:
    """Check a packed pair read from a file against its pattern and size.

    Raises CheckpointError naming tensor `name` (the dense weight's name) for a wrong dtype or shape or a group whose
    mask does not keep exactly `n` of `m`, PatternError when `n:m` itself cannot be stored at that size.
    """
    check_geometry(n, m, in_features, name)
    if values.dtype not in DTYPES:
        raise CheckpointError(f"{name}{VALUES_SUFFIX}: dtype {values.dtype}; packed values are bf16, fp16 or fp32")
    if mask_bytes.dtype != torch.uint8:
        raise CheckpointError(f"{name}{MASK_SUFFIX}: dtype {mask_bytes.dtype}; a packed mask is uint8")
    for suffix, tensor, shape in (
        (VALUES_SUFFIX, values, (out_features, in_features // m * n)),
        (MASK_SUFFIX, mask_bytes, (out_features, in_features // 8)),
    ):
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name}{suffix}: shape {tuple(tensor.shape)}, expected {shape} for {n}:{m}")
    wrong = first_wrong_group(mask_bytes.cpu().contiguous().numpy(), n, m)
    if wrong is not None:
        row, group = wrong
        raise CheckpointError(
            f"{name}{MASK_SUFFIX}: row {row}, columns {group * m} to {group * m + m - 1} do not keep exactly {n} of {m}"
        )


def slice_columns(values: Tensor, mask_bytes: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The packed pair of columns `[start, stop)`, both multiples of 32: a column shard for tensor parallelism.

    The values are `(out, kept)` when every row keeps as many in the slice, else flat (ragged). Raises CheckpointError
    when the bounds are not multiples of 32 inside the weight or the pair is inconsistent.
    """
    check_pair(values, mask_bytes, "weight")
    columns = mask_bytes.shape[1] * 8
    if not 0 <= start < stop <= columns or start % COLUMN_MULTIPLE or stop % COLUMN_MULTIPLE:
        raise CheckpointError(f"columns {start} to {stop} of {columns} are not a slice in whole multiples of 32")
    counts = np.bitwise_count(mask_bytes.cpu().contiguous().numpy())
    if int(counts.sum(dtype=np.int64)) != values.numel():
        raise CheckpointError(f"packed weight: {values.numel()} values for {counts.sum(dtype=np.int64)} mask bits")
    inside = counts[:, start // 8 : stop // 8].sum(axis=1, dtype=np.int64)
    before = counts[:, : start // 8].sum(axis=1, dtype=np.int64)
    row_start = np.concatenate([[0], counts.sum(axis=1, dtype=np.int64).cumsum()[:-1]])
    offset_in_slice = np.concatenate([[0], inside.cumsum()[:-1]])
    index = np.arange(int(inside.sum())) + np.repeat(row_start + before - offset_in_slice, inside)
    picked = values.reshape(-1)[torch.from_numpy(index)]
    if len(inside) and (inside == inside[0]).all():
        picked = picked.view(len(inside), int(inside[0]))
    return picked, mask_bytes[:, start // 8 : stop // 8].contiguous()


def first_wrong_group(bits: npt.NDArray[np.uint8], n: int, m: int) -> tuple[int, int] | None:
    """(row, group) of the first group of `m` columns whose population is not `n`, or None; `bits` is `(out, in/8)`."""
    rows = bits.shape[0]
    if m % 8 == 0:
        counts = np.bitwise_count(bits).reshape(rows, -1, m // 8).sum(axis=2, dtype=np.int32)
    elif 8 % m == 0:
        byte_ok = _byte_table(n, m)[bits]
        if byte_ok.all():
            return None
        counts = np.unpackbits(bits, axis=1, bitorder="little").reshape(rows, -1, m).sum(axis=2, dtype=np.int32)
    else:
        counts = np.unpackbits(bits, axis=1, bitorder="little").reshape(rows, -1, m).sum(axis=2, dtype=np.int32)
    wrong = counts != n
    if not wrong.any():
        return None
    row, group = divmod(int(wrong.argmax()), counts.shape[1])
    return row, group


def _byte_table(n: int, m: int) -> npt.NDArray[np.bool_]:
    """For `m` dividing 8: whether each byte value keeps exactly `n` in each of its groups, `(256,)`."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    ok: npt.NDArray[np.bool_] = (bits.reshape(256, 8 // m, m).sum(axis=2) == n).all(axis=1)
    return ok


def as_bits(tensor: Tensor) -> npt.NDArray[Any]:
    """The tensor's bits as a numpy integer array of its shape (numpy has no bfloat16).

    It shares the memory of a contiguous tensor on the CPU, and copies any other.
    """
    array: npt.NDArray[Any] = tensor.detach().cpu().contiguous().view(BITS[tensor.element_size()]).numpy()
    return array


def _check_dense(weight: Tensor, name: str) -> None:
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise CheckpointError(
            f"{name}: {weight.dtype} {tuple(weight.shape)}; packing needs a bf16, fp16 or fp32 matrix"
        )


def check_pair(values: Tensor, mask_bytes: Tensor, name: str) -> None:
    """Raise CheckpointError unless dtypes and ranks are a packed pair's."""
    if values.dtype not in DTYPES or values.dim() not in (1, 2):
        raise CheckpointError(f"{name}{VALUES_SUFFIX}: {values.dtype} {tuple(values.shape)} is not packed values")
    if mask_bytes.dtype != torch.uint8 or mask_bytes.dim() != 2 or mask_bytes.shape[1] % 4:
        raise CheckpointError(f"{name}{MASK_SUFFIX}: {mask_bytes.dtype} {tuple(mask_bytes.shape)} is not a packed mask")
    if values.dim() == 2 and values.shape[0] != mask_bytes.shape[0]:
        raise CheckpointError(f"{name}: {values.shape[0]} rows of values, {mask_bytes.shape[0]} rows of mask")
