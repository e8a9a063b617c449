"""2:4 for sparse tensor cores: cuSPARSELt's layout, made from a stored pair without a dense weight.

cuSPARSELt holds one tensor [kept values | metadata]. Its metadata order is private, so a matrix of ones under the
mask is compressed and the kept values are then put over the ones: exact also where a kept value is 0 or -0, and only
one layer's matrix exists at a time. Which algorithm is fastest depends on the shape, the batch and the library's
version: `algorithms` lists what runs, `dispatch` measures it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from crepe_deploy.errors import KernelError

from .layout import DeviceWeight, Kind, mask_words

_MULTIPLE: Final = 16  # rows and columns of a 16-bit weight: whole tiles
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


def mask_bits(weight: DeviceWeight) -> Tensor:
    """The bool mask `(rows, columns)` on the weight's device."""
    shifts = torch.arange(32, dtype=torch.int32, device=weight.values.device)
    return ((mask_words(weight).unsqueeze(-1) >> shifts) & 1).bool().view(weight.rows, weight.columns)


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
    accepted: list[int] = []
    for algorithm in range(_MOST_ALGORITHMS):
        try:
            linear(x, packed, None, algorithm)
        except RuntimeError:
            break
        accepted.append(algorithm)
    return accepted
