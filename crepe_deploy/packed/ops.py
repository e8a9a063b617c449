"""The torch operators of packed weights: `crepe_deploy::nm_linear` and `crepe_deploy::nm_expand`.

    nm_linear(x, values, mask, offsets, plan, bias, dense, out_features) -> y      y = x W^T + bias
    nm_expand(values, mask, offsets, out_features, in_features) -> W

`values`, `mask`, `offsets` are a `Prepared` weight's; `plan` is int8 (10), the kernel of each batch bucket (see
`dispatch`). Both have fake implementations, so torch.compile keeps one graph, with a dynamic batch too. Sums are
kept in fp32. Kernels add in different orders, so results may differ in the last bits between kernels, batch sizes and
instruction sets; a given kernel (`stream`, `tile`) gives the same bits in every run and with any number of threads.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

from crepe_deploy.errors import KernelError

from .native import backend
from .prepare import Prepared, expand

NAMESPACE: Final = "crepe_deploy"

torch.library.define(
    f"{NAMESPACE}::nm_linear",
    "(Tensor x, Tensor values, Tensor mask, Tensor offsets, Tensor plan, Tensor? bias, Tensor? dense, "
    "int out_features) -> Tensor",
)
torch.library.define(
    f"{NAMESPACE}::nm_expand",
    "(Tensor values, Tensor mask, Tensor offsets, int out_features, int in_features) -> Tensor",
)


@torch.library.register_fake(f"{NAMESPACE}::nm_linear")  # type: ignore[untyped-decorator]
def _nm_linear_fake(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    plan: Tensor,
    bias: Tensor | None,
    dense: Tensor | None,
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake(f"{NAMESPACE}::nm_expand")  # type: ignore[untyped-decorator]
def _nm_expand_fake(values: Tensor, mask: Tensor, offsets: Tensor, out_features: int, in_features: int) -> Tensor:
    return values.new_empty((out_features, in_features))


@functools.cache
def ensure_registered() -> None:
    """Give the operators their CPU implementation: the native kernels, or torch's where there are none."""
    if backend().native is None:
        torch.library.impl(f"{NAMESPACE}::nm_linear", "CPU", _nm_linear_torch)
        torch.library.impl(f"{NAMESPACE}::nm_expand", "CPU", _nm_expand_torch)


def nm_linear(
    x: Tensor,
    weight: Prepared,
    plan: Tensor,
    bias: Tensor | None = None,
    dense: Tensor | None = None,
) -> Tensor:
    """`x W^T + bias`: x `(..., in)` of the weight's dtype, CPU; returns `(..., out)` of that dtype.

    `dense` is the optional dense copy that a plan may choose. Raises KernelError for tensors that do not fit.
    """
    values, mask, offsets, rows, columns = weight
    if not torch.compiler.is_compiling():
        ensure_registered()
        if x.shape[-1:] != (columns,):
            raise KernelError(f"packed linear: x is {tuple(x.shape)}, the weight {rows} x {columns}")
    return call(torch.ops.crepe_deploy.nm_linear.default, x, values, mask, offsets, plan, bias, dense, rows)


def nm_expand(weight: Prepared) -> Tensor:
    """The dense weight `(out, in)` of a prepared one, by the kernels. Raises KernelError when it is damaged."""
    if not torch.compiler.is_compiling():
        ensure_registered()
    return call(torch.ops.crepe_deploy.nm_expand.default, *weight)


def call(operator: torch._ops.OpOverload, *args: object) -> Tensor:
    """Call an operator of this module and return its tensor; what it refuses is a KernelError."""
    if torch.compiler.is_compiling():
        traced: Tensor = operator(*args)
        return traced
    try:
        result: Tensor = operator(*args)
    except RuntimeError as error:  # NotImplementedError, where no kernel is, among them
        raise KernelError(str(error).split("\nException raised")[0]) from error
    return result


def _nm_linear_torch(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    plan: Tensor,
    bias: Tensor | None,
    dense: Tensor | None,
    out_features: int,
) -> Tensor:
    weight = dense if dense is not None else expand(Prepared(values, mask, offsets, out_features, x.shape[-1]))
    return torch.nn.functional.linear(x, weight, bias)


def _nm_expand_torch(values: Tensor, mask: Tensor, offsets: Tensor, out_features: int, in_features: int) -> Tensor:
    return expand(Prepared(values, mask, offsets, out_features, in_features))
