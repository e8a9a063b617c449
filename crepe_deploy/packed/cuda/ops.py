"""The torch operator `crepe_deploy::nm_linear_cuda`, with a fake implementation: torch.compile keeps one graph.

    nm_linear_cuda(x, values, meta, offsets, counters, tensor24, bias, dense, kind, rows, kept) -> y

`values`, `meta`, `offsets`, `kind`, `rows`, `kept` are a `DeviceWeight`. What serves a call is looked up by shape and
batch in this process (`dispatch`), so a CUDA graph keeps what was chosen when it was captured. `counters` are written
and left as they were found.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

from crepe_deploy.errors import KernelError

from . import dispatch
from .dispatch import Held
from .layout import DeviceWeight, Kind

NAME: Final = "crepe_deploy::nm_linear_cuda"

torch.library.define(
    NAME,
    "(Tensor x, Tensor values, Tensor meta, Tensor offsets, Tensor counters, Tensor? tensor24, Tensor? bias, "
    "Tensor? dense, int kind, int rows, int kept) -> Tensor",
)


@torch.library.register_fake(NAME)  # type: ignore[untyped-decorator]
def _fake(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    offsets: Tensor,
    counters: Tensor,
    tensor24: Tensor | None,
    bias: Tensor | None,
    dense: Tensor | None,
    kind: int,
    rows: int,
    kept: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    offsets: Tensor,
    counters: Tensor,
    tensor24: Tensor | None,
    bias: Tensor | None,
    dense: Tensor | None,
    kind: int,
    rows: int,
    kept: int,
) -> Tensor:
    columns = x.shape[-1]
    held = Held(DeviceWeight(Kind(kind), values, meta, offsets, rows, columns, kept), counters, tensor24, dense)
    flat = x.reshape(-1, columns)
    if not flat.shape[0]:
        return x.new_empty((*x.shape[:-1], rows))
    out = dispatch.run(dispatch.choice_for(held, flat.shape[0]), flat, held, bias)
    return out.reshape(*x.shape[:-1], rows)


@functools.cache
def ensure_registered() -> None:
    """Give the operator its implementation: on CUDA, and on the CPU for Triton's interpreter."""
    for device in ("CUDA", "CPU"):
        torch.library.impl(NAME, device, _linear)


def nm_linear_cuda(x: Tensor, held: Held, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias`: x `(..., columns)` of the weight's dtype, on its device; returns `(..., rows)`.

    Raises KernelError for tensors that do not fit.
    """
    weight = held.weight
    if not torch.compiler.is_compiling():
        ensure_registered()
        if x.shape[-1:] != (weight.columns,):
            raise KernelError(f"packed linear: x is {tuple(x.shape)}, the weight {weight.rows} x {weight.columns}")
    result: Tensor = torch.ops.crepe_deploy.nm_linear_cuda.default(
        x,
        weight.values,
        weight.meta,
        weight.offsets,
        held.counters,
        held.tensor24,
        bias,
        held.dense,
        int(weight.kind),
        weight.rows,
        weight.kept,
    )
    return result
