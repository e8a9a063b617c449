"""`CudaLinear`: the module that holds one packed weight on a device, and runs it by what `dispatch` chooses."""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from torch import Tensor, nn

from crepe_deploy.errors import KernelError

from . import dispatch, launch, ops, semi_structured
from .dispatch import Held
from .layout import DeviceWeight, Kind, restore, to_device

_LOG: Final = logging.getLogger("crepe_deploy")


class CudaLinear(nn.Module):
    """A packed weight in the device's layouts. 2:4 is also given to cuSPARSELt, which adds a ninth to its bytes.

    Raises CheckpointError naming the tensor when the pair does not fit together, KernelError when no kernel here
    serves it, MissingExtra without triton.
    """

    values: Tensor
    meta: Tensor
    offsets: Tensor
    counters: Tensor
    tensor24: Tensor | None
    dense_copy: Tensor | None

    def __init__(self, values: Tensor, mask_bytes: Tensor, device: torch.device | str, name: str = "weight") -> None:
        super().__init__()
        launch.kernels()
        weight = to_device(values.detach(), mask_bytes.detach(), device, name)
        tensor24 = None
        self.no_tensor24 = semi_structured.misfit(weight)
        if self.no_tensor24 is None:
            try:
                tensor24 = semi_structured.compress(weight)
                weight = semi_structured.sharing(weight, tensor24)
            except (KernelError, RuntimeError) as error:
                self.no_tensor24 = str(error)
                _LOG.warning("%s: served without sparse tensor cores: %s", name, error)
        self.kind, self.rows, self.columns, self.kept = weight.kind, weight.rows, weight.columns, weight.kept
        held = {"values": weight.values, "meta": weight.meta, "offsets": weight.offsets, "tensor24": tensor24}
        held |= {"counters": launch.counters_for(weight.rows, weight.values.device), "dense_copy": None}
        for buffer, tensor in held.items():
            self.register_buffer(buffer, tensor, persistent=False)
        ops.ensure_registered()
        self._seen: set[int] = set()

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x `(..., columns)` -> `(..., rows)`. The first batch of a new size is measured, except under capture."""
        held = self.held()
        if not torch.compiler.is_compiling():
            index = dispatch.bucket(x.numel() // self.columns)
            if index not in self._seen and dispatch.tuning_enabled(x.device) and x.numel():
                dispatch.tune(held, (1 << index,))
                self._seen.add(index)
        return ops.nm_linear_cuda(x, held, bias)

    def held(self) -> Held:
        """What a call may use."""
        weight = DeviceWeight(Kind(self.kind), self.values, self.meta, self.offsets, self.rows, self.columns, self.kept)
        return Held(weight, self.counters, self.tensor24, self.dense_copy)

    def tune(self, tokens: tuple[int, ...] = dispatch.USUAL_TOKENS, keep_dense: bool = False) -> None:
        """Choose for each of these batch sizes; with `keep_dense` keep a dense copy where that pays, else drop it."""
        wants_dense = dispatch.tune(self.held(), tokens, keep_dense=keep_dense)
        self.dense_copy = self.to_dense() if wants_dense else None

    def to_dense(self) -> Tensor:
        """The dense weight `(rows, columns)`, a new tensor on the device."""
        return launch.expand(self.held().weight)

    def to_packed(self) -> tuple[Tensor, Tensor]:
        """The stored pair, on the device, bit-identical to what was loaded."""
        values, mask_bytes = restore(self.held().weight)
        return values.clone(), mask_bytes.clone()

    def describe(self) -> dict[str, Any]:
        """What is held, and which choice serves each bucket, with the measured times in ms."""
        held = self.held()
        plan = {}
        for index in range(dispatch.BUCKETS):
            times = dispatch.TUNER.measured.get(dispatch.key(held.weight, index), {})
            plan[str(1 << index)] = {"choice": dispatch.choice_for(held, 1 << index), "times_ms": times}
        return {"kind": Kind(self.kind).name.lower(), "without_tensor24": self.no_tensor24, "plan": plan}
