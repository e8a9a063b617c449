"""2:4 for sparse tensor cores: the layouts of cuSPARSELt and CUTLASS, made from a stored pair without a dense weight.

cuSPARSELt holds one tensor [kept values | metadata]. Its metadata order is private, so a matrix of ones under the
mask is compressed and the kept values are then put over the ones: exact also where a kept value is 0 or -0, and only
one layer's matrix exists at a time. CUTLASS' metadata order is public (`cutlass_pair`). Which algorithm is fastest
depends on the shape, the batch and the library's version: `algorithms` lists what runs, `dispatch` measures it.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from crepe_deploy.errors import KernelError

from .layout import DeviceWeight, Kind, mask_words

_MULTIPLE: Final = 16  # rows and columns of a 16-bit weight; both libraries want whole tiles
_CUTLASS: Final = (32, 64)
_TOKENS: Final = 8
_MOST_ALGORITHMS: Final = 64


def misfit(weight: DeviceWeight) -> str | None:
    """Why cuSPARSELt cannot multiply by this weight, or None."""
    if weight.kind != Kind.NIBBLE:
        return "only 2:4 maps onto sparse tensor cores"
    if weight.rows % _MULTIPLE or weight.columns % _MULTIPLE:
        return f"{weight.rows} x {weight.columns} is no multiple of {_MULTIPLE} x {_MULTIPLE}"
    device = weight.values.device
    if device.type != "cuda":
        return "cuSPARSELt runs on CUDA devices"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the device has no sparse tensor cores"
    if not torch.backends.cusparselt.is_available():
        return "this torch was built without cuSPARSELt"
    return None


def positions(weight: DeviceWeight) -> Tensor:
    """For each 2:4 group the columns 0..3 of its two values, int16 `(rows, columns/4, 2)`. Raises KernelError."""
    if weight.kind != Kind.NIBBLE:
        raise KernelError("only 2:4 maps onto sparse tensor cores")
    bits = mask_bits(weight).view(weight.rows, -1, 4)
    first = bits.to(torch.int16).argmax(-1)
    last = 3 - bits.flip(-1).to(torch.int16).argmax(-1)
    return torch.stack([first, last], -1).to(torch.int16)


def mask_bits(weight: DeviceWeight) -> Tensor:
    """The bool mask `(rows, columns)` on the weight's device."""
    shifts = torch.arange(32, dtype=torch.int32, device=weight.values.device)
    return ((mask_words(weight).unsqueeze(-1) >> shifts) & 1).bool().view(weight.rows, weight.columns)


def cutlass_pair(weight: DeviceWeight) -> tuple[Tensor, Tensor]:
    """The kept values `(rows, columns/2)` and CUTLASS' reordered int16 metadata `(rows, columns/16)`.

    Raises KernelError when the shape is no multiple of 32 x 64.
    """
    rows, columns = weight.rows, weight.columns
    if rows % _CUTLASS[0] or columns % _CUTLASS[1]:
        raise KernelError(f"{rows} x {columns} is no multiple of {_CUTLASS[0]} x {_CUTLASS[1]}, which CUTLASS needs")
    places = positions(weight).view(rows, columns // 16, 8)
    shifts = torch.arange(0, 16, 2, dtype=torch.int16, device=places.device)
    words = torch.zeros(places.shape[:2], dtype=torch.int16, device=places.device)
    for index in range(8):
        words |= places[..., index] << shifts[index]
    reordered = torch.empty_like(words).view(-1)
    reordered[cutlass_order(rows, columns // 16, places.device)] = words.view(-1)
    return weight.values.view(rows, columns // 2), reordered.view(rows, columns // 16)


def cutlass_order(rows: int, width: int, device: torch.device) -> Tensor:
    """Where CUTLASS keeps metadata word (row, column) of `(rows, width)`: rows interleaved by 4 in 32, 2 x 2 blocks
    swapped across their diagonal, pairs of columns one after the other."""
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(width, device=device)[None, :]
    row = row // 32 * 32 + (row % 8) * 4 + (row % 32) // 8
    swap = (row % 2 == 0).to(torch.int64) * (column % 2 == 1) - (row % 2 == 1).to(torch.int64) * (column % 2 == 0)
    row, column = row + swap, column - swap
    return (column // 2 * rows * 2 + row * 2 + column % 2).reshape(-1)


def compress(weight: DeviceWeight) -> Tensor:
    """cuSPARSELt's tensor of this weight, on its device. Raises KernelError when it has no place there."""
    if reason := misfit(weight):
        raise KernelError(reason)
    ones = mask_bits(weight).to(weight.values.dtype)
    packed: Tensor = torch._cslt_compress(ones)
    kept = weight.values.numel()
    flat = packed.view(-1)
    if flat.numel() <= kept or not bool((flat[:kept] == 1).all()):
        raise KernelError("this cuSPARSELt does not keep the values in front; its layout is not known here")
    flat[:kept] = weight.values
    return packed


def sharing(weight: DeviceWeight, packed: Tensor) -> DeviceWeight:
    """The weight with its values read out of cuSPARSELt's tensor, so that they are held once."""
    values = packed.view(-1)[: weight.values.numel()]
    return DeviceWeight(weight.kind, values, weight.meta, weight.offsets, weight.rows, weight.columns, weight.kept)


def as_tensor(weight: DeviceWeight, packed: Tensor) -> Tensor:
    """torch's own `SparseSemiStructuredTensor` of it, for code that expects one."""
    from torch.sparse import SparseSemiStructuredTensorCUSPARSELT

    build: Any = SparseSemiStructuredTensorCUSPARSELT
    tensor: Tensor = build(
        shape=torch.Size((weight.rows, weight.columns)),
        packed=packed,
        meta=None,
        packed_t=None,
        meta_t=None,
        compressed_swizzled_bitmask=None,
        fuse_transpose_cusparselt=True,
        alg_id_cusparselt=0,
        requires_grad=False,
    )
    return tensor


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, algorithm: int = 0, split: int = 1) -> Tensor:
    """`x W^T + bias` by cuSPARSELt: x `(tokens, columns)` -> `(tokens, rows)`; tokens are padded to eight."""
    tokens = x.shape[0]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % _TOKENS)).contiguous()
    out: Tensor = torch._cslt_sparse_mm(
        packed, padded.t(), bias, transpose_result=True, alg_id=algorithm, split_k=split
    )
    return out[:tokens]


def algorithms(packed: Tensor, x: Tensor) -> list[int]:
    """The algorithm ids that this library accepts for this weight and batch, counted up until one is refused."""
    found: list[int] = []
    for algorithm in range(_MOST_ALGORITHMS):
        try:
            linear(x, packed, None, algorithm)
        except RuntimeError:
            break
        found.append(algorithm)
    return found


def round_trip(weight: DeviceWeight) -> Tensor:
    """The dense weight that CUTLASS' pair stands for, by torch's own conversion: for checks."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

    values, metadata = cutlass_pair(weight)
    dense: Tensor = sparse_semi_structured_to_dense_cutlass(values, metadata)  # type: ignore[no-untyped-call]
    return dense
