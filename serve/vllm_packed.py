"""Packed linear layers in vLLM, as its quantization method `crepe_nm`: on CPUs and CUDA devices, dense ones elsewhere.

Importing this module registers the method; see `vllm_plugin`. A layer's kernels are chosen when its weights are loaded
(`process_weights_after_loading`), by what `packed.dispatch` or `packed.cuda.dispatch` measured on this machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.parameter import ModelWeightParameter

from ..errors import CheckpointError, ConfigError
from ..packed import dispatch, ops
from ..packed.config import COLUMN_MULTIPLE, QUANT_METHOD, PackedConfig
from ..packed.cuda.layout import misfit
from ..packed.cuda.linear import CudaLinear
from ..packed.format import DTYPES, slice_columns, unpack, validate
from ..packed.prepare import Prepared, prepare
from ..pattern import NM

_LOG = logging.getLogger("crepe_deploy")


@register_quantization_config(QUANT_METHOD)
class CrepeNmConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` of `config.json`: the patterns of the packed layers, `ignore` for the dense ones."""

    def __init__(self, packed: PackedConfig) -> None:
        super().__init__()
        self.packed = packed
        self.ignore = set(packed.ignore)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CrepeNmConfig:
        """Raises CheckpointError for a newer version or a malformed entry, ConfigError for coded values."""
        packed = PackedConfig.from_dict(config)
        packed.refuse_values("vLLM")
        return cls(packed)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Spell the named modules as vLLM does."""
        self.ignore |= set(hf_to_vllm_mapper.apply_list(sorted(self.ignore)))
        renamed = hf_to_vllm_mapper.apply_dict(dict(self.packed.overrides))
        self.packed = replace(self.packed, overrides={**self.packed.overrides, **renamed})

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """Packed for linear layers that are not ignored, vLLM's own for all others."""
        if not isinstance(layer, LinearBase):
            return None
        if self.is_dense(prefix):
            return UnquantizedLinearMethod()
        return CrepeNmLinearMethod(self.packed.of(*self._parts(prefix)), prefix)

    def _parts(self, prefix: str) -> list[str]:
        """The checkpoint's modules in a layer that vLLM may have fused."""
        parent, _, leaf = prefix.rpartition(".")
        return [f"{parent}.{part}".lstrip(".") for part in self.packed_modules_mapping.get(leaf, [leaf])]

    def is_dense(self, prefix: str) -> bool:
        """Whether `ignore` names this module, or every part of this fused one. Raises ConfigError for some of them."""
        parts = self._parts(prefix)
        dense = [part for part in parts if part in self.ignore]
        if dense and len(dense) < len(parts):
            raise ConfigError(
                f"vLLM fuses {', '.join(parts)} into one layer, and only {', '.join(dense)} is dense in this packed "
                "checkpoint: prune all or none of them, or serve the dense export"
            )
        return bool(dense)


@register_weight_loader_v2_supported_method
class CrepeNmLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One packed linear layer, or this rank's shard of one.

    Rows and, for N:M, columns are sharded while loading. A column shard of an unstructured weight keeps another
    count in each row, so there the whole weight is loaded and cut afterwards.
    """

    def __init__(self, packed: PackedConfig, prefix: str) -> None:
        self.packed = packed
        self.prefix = prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer empty stored tensors under the checkpoint's names. Raises ConfigError for an unfit shard."""
        n, m = self.packed.geometry(input_size)
        self._check_shard(input_size_per_partition, input_size, m)
        layer.crepe_cut_at_load = input_size_per_partition != input_size and not isinstance(self.packed.pattern, NM)
        layer.crepe_columns = input_size_per_partition
        columns = input_size if layer.crepe_cut_at_load else input_size_per_partition
        rows = sum(output_partition_sizes)
        loader = extra_weight_attrs["weight_loader"]
        if layer.crepe_cut_at_load:
            loader = _load_whole
        # Recognisable contents: vLLM does not tell a quantization method which tensors the files did not have.
        values = torch.full((rows, columns * n // m), float("nan"), dtype=params_dtype)
        mask = torch.zeros((rows, columns // 8), dtype=torch.uint8)
        for name, data in (("weight_values", values), ("weight_mask", mask)):
            layer.register_parameter(name, _parameter(data, loader))
        layer.register_parameter("weight", _parameter(torch.empty(0, dtype=params_dtype), _load_guard))

    def _check_shard(self, columns: int, all_columns: int, m: int) -> None:
        if not self.packed.fits(all_columns):
            raise ConfigError(f"{self.prefix}: {all_columns} input columns do not fit pattern {self.packed.pattern}")
        if columns % COLUMN_MULTIPLE or (columns != all_columns and m != all_columns and columns % m):
            raise ConfigError(
                f"{self.prefix}: {columns} of its {all_columns} input columns on each rank are no multiple of "
                f"{COLUMN_MULTIPLE} and of pattern {self.packed.pattern}'s group; use a smaller tensor-parallel size"
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded and turn it into its device's kernel layout; dense where no kernel serves it."""
        values, mask = layer.weight_values.data, layer.weight_mask.data
        self._check_loaded(layer, values, mask)
        if layer.crepe_cut_at_load:
            start = layer.tp_rank * layer.crepe_columns
            values, mask = slice_columns(values, mask, start, start + layer.crepe_columns)
        for name in ("weight", "weight_values", "weight_mask"):
            delattr(layer, name)
        if values.device.type != "cpu":
            self._to_device(layer, values, mask)
            return
        weight = prepare(values, mask, self.prefix)
        ops.ensure_registered()
        layer.kernel_values, layer.kernel_mask = _frozen(weight.values), _frozen(weight.mask)
        layer.kernel_offsets, layer.kernel_plan = _frozen(weight.offsets), _frozen(dispatch.plan_for(weight))
        layer.kernel_rows = weight.out_features
        dispatch.tune(weight, layer.kernel_plan.data, dispatch.USUAL_TOKENS)

    def _to_device(self, layer: Any, values: Tensor, mask: Tensor) -> None:
        """The GPU kernels' layout, measured for the usual batches before vLLM captures its graphs."""
        reason = misfit(mask.shape[0], mask.shape[1] * 8, values.dtype)
        if values.device.type != "cuda":
            reason = f"there are no packed kernels for {values.device.type}"
        if reason is not None:
            _LOG.warning("%s: served dense, as large and as fast as before pruning: %s", self.prefix, reason)
            layer.weight = _frozen(unpack(values.cpu(), mask.cpu()).to(values.device))
            return
        layer.crepe_on_device = CudaLinear(values, mask, values.device, self.prefix)
        layer.crepe_on_device.tune()

    def _check_loaded(self, layer: Any, values: Tensor, mask: Tensor) -> None:
        if bool(torch.isnan(values).any()):
            raise CheckpointError(f"{self.prefix}.weight_values was not in the checkpoint, or holds NaN")
        if not bool(mask.any()):
            raise CheckpointError(f"{self.prefix}.weight_mask was not in the checkpoint")
        columns = mask.shape[1] * 8
        n, m = self.packed.geometry(columns)
        validate(values, mask, n, m, columns, mask.shape[0], f"{self.prefix}.weight")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x `(..., in)` -> `(..., out)`."""
        if "crepe_on_device" in layer._modules:
            y: Tensor = layer.crepe_on_device(x, bias)
            return y
        if "kernel_values" not in layer._parameters:
            return torch.nn.functional.linear(x, layer.weight, bias)
        weight = Prepared(
            layer.kernel_values, layer.kernel_mask, layer.kernel_offsets, layer.kernel_rows, layer.crepe_columns
        )
        return ops.nm_linear(x, weight, layer.kernel_plan, bias)


def _parameter(data: Tensor, loader: Callable[..., None]) -> ModelWeightParameter:
    return ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _load_whole(parameter: nn.Parameter, loaded: Tensor) -> None:
    if parameter.shape != loaded.shape:
        raise CheckpointError(f"a packed tensor has shape {tuple(loaded.shape)}, expected {tuple(parameter.shape)}")
    parameter.data.copy_(loaded)


def _load_guard(_parameter: nn.Parameter, loaded: Tensor, *_shard: Any) -> None:
    """The empty tensor that stops readers without us; anything else under its name is a dense weight."""
    if loaded.numel():
        raise CheckpointError(
            f"a layer that should be packed has a dense weight {tuple(loaded.shape)}; list it in ignore"
        )
