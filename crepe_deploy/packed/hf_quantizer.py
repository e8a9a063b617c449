"""transformers: the quantizer `crepe_nm`, with which `from_pretrained` loads a packed checkpoint and runs it packed.

Importing this module registers it; `import crepe_deploy` arranges for that as soon as transformers' quantizers are
imported. Linear layers are replaced by `PackedLinear` or, for coded values, `CodedLinear` before any weight is read, so
the dense model never exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from crepe_deploy.errors import CheckpointError, ConfigError

from .config import QUANT_METHOD, PackedConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from crepe_deploy.store.checkpoint import TensorInfo

    from .coded_linear import CodedLinear
    from .linear import PackedLinear

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


@register_quantization_config(QUANT_METHOD)
class CrepeNmConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of `config.json`, checked. Raises CheckpointError for what this version cannot read."""

    def __init__(self, **content: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.packed = PackedConfig.from_dict({"quant_method": QUANT_METHOD, **content})

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` holds it."""
        return self.packed.to_dict()


@register_quantizer(QUANT_METHOD)
class CrepeNmQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds a model of packed linear layers on the meta device, checks what was loaded, saves it packed again."""

    quantization_config: CrepeNmConfig

    def validate_environment(self, *_args: Any, device_map: Any = None, **_options: Any) -> None:
        """Raise ConfigError for what cannot work: packing while loading, devices without packed kernels."""
        if not self.pre_quantized:
            raise ConfigError(f"'{QUANT_METHOD}' loads packed checkpoints; make one with: crepe-deploy export")
        device_map = self.update_device_map(device_map)
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        values = self.quantization_config.packed.values
        wrong = sorted({str(place) for place in places if not _runs_on(str(place), cpu_alone=values is not None)})
        runs = "packed layers run on the CPU and on the CUDA devices this machine has"
        if values is not None:
            runs = f"{values} values run on the CPU"
        if wrong:
            raise ConfigError(
                f"device_map asks for {', '.join(wrong)}: {runs}; load with device_map='cpu', or use "
                "crepe-deploy export --format dense for other devices"
            )

    def update_device_map(self, device_map: Any) -> Any:
        """ "auto" and its like mean the first CUDA device, the CPU where there is nothing else; others are refused."""
        import torch

        if not isinstance(device_map, str) or device_map not in _AUTOMATIC:
            return device_map
        if self.quantization_config.packed.values is not None:
            return {"": "cpu"}
        if torch.cuda.is_available():
            return {"": "cuda:0"}
        return device_map if torch.accelerator.is_available() else {"": "cpu"}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_options: Any
    ) -> None:
        from torch import nn

        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        chosen = {name: module for name, module in linears.items() if not self._ignored(model, name)}
        stored = _stored(checkpoint_files)
        ignored_keys = set()
        for name, linear in chosen.items():
            key = _key(model, f"{name}.weight", stored)
            ignored_keys.add(_exactly(key))
            parent, _, leaf = name.rpartition(".")
            layer = self._packed(linear, name, key, stored)
            vars(layer)["weight"] = _initialised()
            setattr(model.get_submodule(parent), leaf, layer)
        if not chosen:
            raise CheckpointError("config.json says packed, and its 'ignore' leaves no linear layer to pack")
        # The guards, `P.weight` of shape (0,), have no parameter to go to.
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *ignored_keys}

    def _ignored(self, model: Any, name: str) -> bool:
        ignore = self.quantization_config.packed.ignore
        return name in ignore or f"{getattr(model, 'base_model_prefix', '')}.{name}" in ignore

    def _packed(
        self, linear: nn.Linear, name: str, key: str, stored: Mapping[str, TensorInfo]
    ) -> PackedLinear | CodedLinear:
        from . import parts
        from .coded import SCALES_SUFFIX
        from .coded_linear import CodedLinear
        from .linear import PackedLinear

        packed = self.quantization_config.packed
        config = packed.of(name if name in packed.overrides else key.removesuffix(".weight"))
        if not config.fits(linear.in_features):
            raise CheckpointError(f"{name}: {linear.in_features} input columns do not fit pattern {config.pattern}")
        n, m = config.geometry(linear.in_features)
        for suffix in parts.suffixes(config, all_kept=n == m):  # transformers would fill what is missing with noise
            if key + suffix not in stored:
                raise CheckpointError(f"tensor '{key}{suffix}' is missing from the packed checkpoint")
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        if config.values is None:
            return PackedLinear(*shape, n, m, linear.weight.dtype, "meta")
        return CodedLinear(*shape, config, stored[key + SCALES_SUFFIX].dtype, linear.weight.dtype, "meta")

    def _process_model_after_weight_loading(self, model: Any, **_options: Any) -> Any:
        from .linear import PackedLinear, check_loaded

        for name, layer in _packed_layers(model).items():
            del vars(layer)["weight"]
            if not isinstance(layer, PackedLinear):
                layer.check(f"{name}.weight")
                continue
            check_loaded(layer, f"{name}.weight")
            layer.prepare(f"{name}.weight")
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The stored tensors, bit-identical to what was loaded, with the guards that stop readers without us."""
        state = model.state_dict()
        part = "scales" if self.quantization_config.packed.values else "values"
        for name in _packed_layers(model):
            state[f"{name}.weight"] = state[f"{name}.weight_{part}"].new_empty(0)
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _runs_on(place: str, cpu_alone: bool = False) -> bool:
    """Whether packed layers run on this place of a device map: the CPU, or a CUDA device by name or number."""
    import torch

    if place in ("None", "cpu") or cpu_alone:
        return place in ("None", "cpu")
    kind, _, index = ("cuda", "", place) if place.isdigit() else place.partition(":")
    return kind == "cuda" and (not index or index.isdigit()) and int(index or 0) < torch.cuda.device_count()


def _initialised() -> torch.Tensor:
    """What model code finds at `weight` while it initialises, and leaves alone: a tensor marked as loaded."""
    import torch

    mark = torch.empty(1, 1)
    mark._is_hf_initialized = True  # type: ignore[attr-defined]
    return mark


def _packed_layers(model: Any) -> dict[str, PackedLinear | CodedLinear]:
    from .coded_linear import CodedLinear
    from .linear import PackedLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear | CodedLinear)}


def _stored(checkpoint_files: list[str] | None) -> dict[str, TensorInfo]:
    """Every tensor in the files by name, from their headers. Raises CheckpointError."""
    from crepe_deploy.store.checkpoint import read_header

    if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
        raise CheckpointError("a packed model is loaded from the safetensors files of its folder")
    return {name: info for file in checkpoint_files for name, info in read_header(Path(file)).items()}


def _key(model: Any, name: str, stored: Mapping[str, TensorInfo]) -> str:
    """The file's name for the weight `name`, its own where the file has nothing of it."""
    from .parts import SUFFIXES

    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if any(candidate + part in stored for part in SUFFIXES):
            return candidate
    return name


def _exactly(key: str) -> str:
    """A pattern that finds this name with or without a model prefix, and no other."""
    import re

    return rf"(^|\.){re.escape(key)}$"
