"""`CodedLinear`: a linear layer that holds codes and scales (version 3) and never the whole dense weight.

It computes with what the dense checkpoint holds: code * scale is rounded to the checkpoint's dtype before it is
multiplied, in whatever dtype that happens. The operator `crepe_deploy::coded_linear` decodes a block of rows at a time
with torch and serves the CPU; there are no kernels for other devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from crepe_deploy.errors import CheckpointError, KernelError
from crepe_deploy.grid import Grid

from . import parts
from .coded import Coded, coded_rows, decode
from .config import PackedConfig
from .ops import NAMESPACE, call

BLOCK: Final = 1 << 20  # entries of the weight that are dense at a time

torch.library.define(
    f"{NAMESPACE}::coded_linear",
    "(Tensor x, Tensor codes, Tensor scales, Tensor? mask, Tensor? bias, int bits, int group) -> Tensor",
)


@torch.library.register_fake(f"{NAMESPACE}::coded_linear")  # type: ignore[untyped-decorator]
def _coded_linear_fake(
    x: Tensor, codes: Tensor, scales: Tensor, mask: Tensor | None, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.impl(f"{NAMESPACE}::coded_linear", "CPU")
def _coded_linear_torch(
    x: Tensor, codes: Tensor, scales: Tensor, mask: Tensor | None, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    coded, grid = Coded(codes, scales, mask, x.shape[-1]), Grid(bits, group or None, scales.dtype)
    rows = max(1, BLOCK // x.shape[-1])
    products = [
        nn.functional.linear(
            x,
            decode(coded_rows(coded, start, start + rows), grid).to(x.dtype),
            None if bias is None else bias[start : start + rows],
        )
        for start in range(0, len(codes), rows)
    ]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


class CodedLinear(nn.Module):
    """`y = x W^T + bias` with `W` (out, in) stored as codes and scales, under a mask unless everything is kept.

    weight_codes, weight_scales, weight_mask: the stored tensors, under a checkpoint's names. bias: dtype (out) or None.
    config: the layer's own. stored: the dtype of the checkpoint's weights, which scales keep whatever the model is
    cast to.
    """

    weight_codes: Tensor
    weight_scales: Tensor
    weight_mask: Tensor | None
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, config: PackedConfig, stored: torch.dtype,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.grid = parts.grid_of(config, stored)
        self.register_parameter("weight_mask", None)
        for suffix, part in parts.parts(config, stored, out_features, in_features).items():
            held = torch.empty(part.shape, dtype=part.dtype, device=device)
            self.register_parameter(f"weight{suffix}", nn.Parameter(held, requires_grad=False))
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., in)` on the CPU -> `(..., out)` of its dtype. Raises KernelError for anything else."""
        if not torch.compiler.is_compiling() and x.shape[-1:] != (self.in_features,):
            shape = f"{self.out_features} x {self.in_features}"
            raise KernelError(f"packed linear: x is {tuple(x.shape)}, the weight {shape}")
        operator = torch.ops.crepe_deploy.coded_linear.default
        held = (self.weight_codes, self.weight_scales, self.weight_mask, self.bias)
        return call(operator, x, *held, self.grid.bits, self.grid.group or 0)

    def to_dense(self) -> Tensor:
        """The dense weight (out, in), as the dense checkpoint holds it, a new tensor."""
        held = Coded(self.weight_codes, self.weight_scales, self.weight_mask, self.in_features)
        return decode(held, self.grid)

    def check(self, name: str) -> None:
        """Raise CheckpointError naming the tensor unless the stored tensors of `name` are exactly the config's."""
        held = {suffix: self._parameters.get(f"weight{suffix}") for suffix in parts.SUFFIXES}
        found = {suffix: tensor for suffix, tensor in held.items() if tensor is not None}
        shape = parts.checked(found, self.config, name)
        if shape != (self.out_features, self.in_features):
            raise CheckpointError(f"{name}: packed as {shape}, the model has {self.out_features} x {self.in_features}")

    def extra_repr(self) -> str:
        shown = f"pattern={self.config.pattern}, values={self.config.values}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {shown}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedLinear:
        """Scales say which numbers the weights are, so they are moved and never cast. Raises KernelError."""
        scales = self.weight_scales.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        place = require_place(self.weight_codes.device, self.config)
        if self.weight_scales.dtype != scales.dtype:
            self.weight_scales = nn.Parameter(scales.to(place), requires_grad=False)
        return self


def require_place(device: torch.device, config: PackedConfig) -> torch.device:
    """The device, where coded values run there or hold nothing there. Raises KernelError."""
    if device.type not in ("cpu", "meta"):
        raise KernelError(
            f"{config.values} values run on the CPU, not on {device}: load with device_map='cpu' (--device cpu), or "
            "use crepe-deploy export --format dense for other devices"
        )
    return device
