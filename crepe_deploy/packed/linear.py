"""`PackedLinear`: a linear layer that holds a packed weight and never the dense one.

Before `prepare()` it holds the stored tensors `weight_values` and `weight_mask` under a checkpoint's names, so any
loader can fill them. `prepare()` turns them into the kernels' layout, which takes their place: resident memory stays
that of the file. On a CUDA device the kernels of `cuda` take the weight instead. `state_dict()` and `to_packed()` give
the stored tensors back bit-identical at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from crepe_deploy.errors import CheckpointError, ConfigError, KernelError
from crepe_deploy.nearest import unknown

from . import dispatch, ops
from .format import check_geometry, unpack, validate
from .prepare import Prepared, prepare, restore

if TYPE_CHECKING:
    from .cuda.linear import CudaLinear

KeepDense = Literal["never", "auto"]
KEEP_DENSE: Final[tuple[KeepDense, ...]] = ("never", "auto")
_KERNEL_TENSORS: Final = ("kernel_values", "kernel_mask", "kernel_offsets")


class PackedLinear(nn.Module):
    """`y = x W^T + bias` with `W` `(out, in)` packed as N:M, or unstructured with `n` kept of `m == in` in each row.

    weight_values  dtype (out, in*n/m)    until prepare()
    weight_mask    uint8 (out, in/8)      until prepare()
    bias           dtype (out) or None

    `keep_dense="auto"` lets the layer keep a dense copy as well where a measurement says that dense is faster for
    some batch size that `tune` was asked about; the default never spends that memory. Raises PatternError when n:m
    does not fit.
    """

    weight_values: Tensor | None
    weight_mask: Tensor | None
    bias: Tensor | None
    kernel_values: Tensor | None
    kernel_mask: Tensor | None
    kernel_offsets: Tensor | None
    kernel_plan: Tensor
    dense_copy: Tensor | None
    on_device: CudaLinear | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        n: int,
        m: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        keep_dense: KeepDense = "never",
    ) -> None:
        super().__init__()
        check_geometry(n, m, in_features)
        if keep_dense not in KEEP_DENSE:
            raise ConfigError(unknown("keep_dense", keep_dense, KEEP_DENSE))
        self.in_features, self.out_features, self.n, self.m = in_features, out_features, n, m
        self.keep_dense: KeepDense = keep_dense
        self._seen: set[int] = set()  # batch buckets whose plan needs no more attention
        dtype = dtype or torch.get_default_dtype()
        self._hold_stored(
            torch.empty((out_features, in_features // m * n), dtype=dtype, device=device),
            torch.empty((out_features, in_features // 8), dtype=torch.uint8, device=device),
        )
        empty_bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty_bias is None else nn.Parameter(empty_bias, requires_grad=False))
        for name in (*_KERNEL_TENSORS, "dense_copy"):
            self.register_buffer(name, None, persistent=False)
        self.register_buffer("kernel_plan", None, persistent=False)
        self.on_device = None

    @classmethod
    def from_packed(
        cls, values: Tensor, mask_bytes: Tensor, n: int, m: int, bias: Tensor | None = None, name: str = "weight"
    ) -> PackedLinear:
        """A prepared layer around a stored pair. Raises CheckpointError naming the tensor when the pair is not n:m."""
        rows, columns = mask_bytes.shape[0], mask_bytes.shape[-1] * 8
        validate(values, mask_bytes, n, m, columns, rows, name)
        layer = cls(columns, rows, bias is not None, n, m, values.dtype, "meta")
        layer._hold_stored(values, mask_bytes)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().contiguous(), requires_grad=False)
        layer.prepare(name)
        return layer

    @property
    def prepared(self) -> bool:
        """Whether the weight is in kernel layout."""
        return self.kernel_values is not None or self.on_device is not None

    def prepare(self, name: str = "weight") -> None:
        """Turn the stored tensors into kernel layout and drop them; does nothing the second time.

        Raises CheckpointError naming the tensor when mask and values do not fit together, KernelError where no kernel
        serves it: on devices that are neither the CPU nor CUDA, and on CUDA in float32.
        """
        if self.prepared:
            return
        if self.weight_values is None or self.weight_mask is None:
            raise KernelError(f"{name}: a packed layer without its tensors cannot be prepared")
        values, mask_bytes = self.weight_values.detach(), self.weight_mask.detach()
        if values.device.type == "cuda":
            from .cuda.linear import CudaLinear

            self.on_device = CudaLinear(values, mask_bytes, values.device, name)
            self.weight_values = self.weight_mask = None
        else:
            self._adopt(prepare(values, mask_bytes, name))

    def to_packed(self) -> tuple[Tensor, Tensor]:
        """The stored pair `(values, mask_bytes)`, bit-identical to what was loaded; copies once prepared."""
        if self.on_device is not None:
            return self.on_device.to_packed()
        if self.prepared:
            return restore(self._weight())
        if self.weight_values is None or self.weight_mask is None:
            raise KernelError("a packed layer without its tensors has nothing to give back")
        return self.weight_values.detach(), self.weight_mask.detach()

    def to_dense(self) -> Tensor:
        """The dense weight `(out, in)`, a new tensor."""
        if self.on_device is not None:
            return self.on_device.to_dense()
        return ops.nm_expand(self._weight()) if self.prepared else unpack(*self.to_packed())

    def tune(self, tokens: tuple[int, ...] = dispatch.USUAL_TOKENS) -> None:
        """Choose the kernel for each of these batch sizes, by measurement or from the cache; prepares if needed.

        With `keep_dense="auto"` this is where a dense copy is made, or given up.
        """
        self.prepare()
        if self.on_device is not None:
            self.on_device.tune(tokens, self.keep_dense == "auto")
            return
        wants_dense = dispatch.tune(self._weight(), self.kernel_plan, tokens, self.keep_dense == "auto")
        self.dense_copy = self.to_dense() if wants_dense else None

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., in)` of the layer's dtype, on its device -> `(..., out)`. Raises KernelError for anything else."""
        if self.on_device is not None:
            y: Tensor = self.on_device(x, self.bias)
            return y
        if torch.compiler.is_compiling():
            return ops.nm_linear(x, self._weight(), self.kernel_plan, self.bias, self.dense_copy)
        held = self._buffers  # attribute access on a module costs as much as a small product
        if held["kernel_values"] is None:
            self.prepare()
            return self.forward(x)
        weight = Prepared(
            held["kernel_values"],
            held["kernel_mask"],  # type: ignore[arg-type]
            held["kernel_offsets"],  # type: ignore[arg-type]
            self.out_features,
            self.in_features,
        )
        plan: Tensor = held["kernel_plan"]  # type: ignore[assignment]
        bucket = dispatch.bucket(x.numel() // self.in_features)
        if bucket not in self._seen:
            dispatch.ensure_tuned(weight, plan, x)
            self._seen.add(bucket)
        return ops.nm_linear(x, weight, plan, self._parameters["bias"], held["dense_copy"])

    def describe(self) -> dict[str, Any]:
        """What this layer holds and which kernel serves each batch bucket, with the measured times in ms."""
        held = [t for t in (*self.parameters(), *self.buffers()) if t is not None]
        size = sum(t.numel() * t.element_size() for t in held)
        report: dict[str, Any] = {
            "shape": [self.out_features, self.in_features],
            "pattern": f"{self.n}:{self.m}",
            "prepared": self.prepared,
            "resident_bytes": size,
            "keep_dense": self.keep_dense,
            "dense_copy": self.dense_copy is not None,
        }
        if self.on_device is not None:
            report |= self.on_device.describe()
        elif self.prepared:
            report["plan"] = dispatch.describe_plan(self._weight(), self.kernel_plan)
        return report

    def extra_repr(self) -> str:
        pattern = f"{self.n}:{self.m}"
        return f"in_features={self.in_features}, out_features={self.out_features}, pattern={pattern}"

    def _weight(self) -> Prepared:
        if self.kernel_values is None or self.kernel_mask is None or self.kernel_offsets is None:
            raise KernelError("the packed layer is not prepared: call prepare() after loading its tensors")
        return Prepared(self.kernel_values, self.kernel_mask, self.kernel_offsets, self.out_features, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moving to another device goes through the stored tensors: kernel layouts belong to one device."""
        if self.prepared and fn(self._somewhere()).device != self._somewhere().device:
            self._back_to_stored()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _somewhere(self) -> Tensor:
        """An empty tensor on the device of the prepared weight, of its dtype."""
        kernel = self.kernel_values if self.on_device is None else self.on_device.values
        assert kernel is not None
        return kernel.new_empty(0)

    def _back_to_stored(self) -> None:
        values, mask_bytes = self.to_packed()
        self.kernel_values = self.kernel_mask = self.kernel_offsets = self.dense_copy = self.on_device = None
        self._hold_stored(values, mask_bytes)

    def _hold_stored(self, values: Tensor, mask_bytes: Tensor) -> None:
        """Hold these stored tensors and nothing in kernel layout."""
        self.register_parameter("weight_values", nn.Parameter(values, requires_grad=False))
        self.register_parameter("weight_mask", nn.Parameter(mask_bytes, requires_grad=False))

    def _adopt(self, weight: Prepared) -> None:
        ops.ensure_registered()
        self.weight_values = self.weight_mask = None
        self.kernel_values, self.kernel_mask, self.kernel_offsets = weight.values, weight.mask, weight.offsets
        self.kernel_plan = dispatch.plan_for(weight)
        self._seen.clear()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.prepared:
            values, mask_bytes = self.to_packed()
            destination[prefix + "weight_values"] = values
            destination[prefix + "weight_mask"] = mask_bytes

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A prepared layer goes back to stored tensors first; the next forward prepares what was loaded."""
        if self.prepared and prefix + "weight_values" in state_dict:
            self._back_to_stored()
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_loaded(layer: PackedLinear, name: str) -> None:
    """Raise CheckpointError naming the tensor unless the layer's stored tensors are exactly its pattern's."""
    if layer.weight_values is None or layer.weight_mask is None:
        raise CheckpointError(f"{name}: the packed tensors were not loaded")
    validate(layer.weight_values, layer.weight_mask, layer.n, layer.m, layer.in_features, layer.out_features, name)
