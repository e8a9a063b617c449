"""A stand-in for a GPU: tensors that say that they lie on another device, and compute on the CPU.

There is no GPU where these tests run. A `StandIn` carries an ordinary tensor and reports the device "lazy:0", which
torch knows and nobody installs. Inside `stand_in()` every operation is looked at: what mixes tensors of both sides
raises, as on a GPU, and so does indexing by a tensor of the other side, which a GPU would let pass. Only copies cross.
It proves where tensors are, nothing about speed, memory or a GPU's rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from crepe_deploy import device

NAME = "lazy:0"
PLACE = torch.device(NAME)
CROSSING = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}


class MixedDevicesError(RuntimeError):
    """An operation was given tensors of two devices."""


class StandIn(Tensor):
    """A tensor on the stand-in device; `held` is the CPU's."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> StandIn:
        with torch.inference_mode(held.is_inference()):
            made = Tensor._make_wrapper_subclass(
                cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
                device=PLACE,
            )  # fmt: skip
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert a tensor of the stand-in device to numpy: copy it to the host first")

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"StandIn({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


class _Everything(TorchDispatchMode):
    """Sees operations without a tensor of the stand-in too: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatched(func, args, kwargs or {})


def dispatched(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU, and give its results the device that they would have."""
    flat = tree_flatten((args, kwargs))[0]
    composed = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    if composed and any(isinstance(value, torch.device) for value in flat):  # whole in inference mode: `to`
        with _Everything():
            return func.decompose(*args, **kwargs)
    given = [value for value in flat if isinstance(value, Tensor)]
    ours = any(isinstance(tensor, StandIn) for tensor in given)
    asked = kwargs.get("device")
    name = func._schema.name
    if ours and name not in CROSSING:
        for tensor in given:
            if not isinstance(tensor, StandIn) and tensor.ndim:
                raise MixedDevicesError(f"{func} was given tensors on {PLACE} and on {tensor.device}")
    held_args, held_kwargs = tree_map(_held, (args, kwargs))
    if asked is not None:
        ours = torch.device(asked).type == PLACE.type
        held_kwargs["device"] = torch.device("cpu") if ours else asked
    if name == "aten::copy_":
        ours = isinstance(args[0], StandIn)
    results = func(*held_args, **held_kwargs)
    return _returned(given, results) if ours else results


def _held(value: Any) -> Any:
    return value.held if isinstance(value, StandIn) else value


def _returned(given: list[Tensor], results: Any) -> Any:
    """The results on our side; what was given and comes back is the same object."""
    by_id = {id(tensor.held): tensor for tensor in given if isinstance(tensor, StandIn)}

    def ours(result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        return by_id[id(result)] if id(result) in by_id else StandIn(result)

    return tree_map(ours, results)


@contextlib.contextmanager
def stand_in() -> Iterator[torch.device]:
    """Inside, the device exists and is what "auto" means."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "devices", lambda: ["cpu", NAME])
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is made on the host and moved
        try:
            with _Everything():
                yield PLACE
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
