"""The architecture that a config.json describes: its configuration, and its modules without weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crepe_deploy.errors import UnsupportedModel
from crepe_deploy.store.checkpoint import read_config


def load_config(root: Path) -> Any:
    """The transformers configuration of a folder, without remote code. Raises CheckpointError, UnsupportedModel."""
    from transformers import AutoConfig

    content = read_config(root)
    name = content.get("model_type", "unknown")
    if "quantization_config" in content:
        method = (content["quantization_config"] or {}).get("quant_method", "unknown")
        raise UnsupportedModel(f"{root} is already quantised or packed ({method}); give the unquantised model")
    if "auto_map" in content and name not in _known_model_types():
        raise UnsupportedModel(f"{root}: model type '{name}' needs code from the checkpoint, which is never run")
    try:
        config = AutoConfig.from_pretrained(root, trust_remote_code=False)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise UnsupportedModel(f"{root}: config.json of model type '{name}' is not understood: {error}") from error
    if getattr(config, "is_encoder_decoder", False) or hasattr(config, "vision_config"):
        raise UnsupportedModel(f"model type '{name}' is not a text-only decoder")
    return config


def _known_model_types() -> set[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())


def build_meta(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of a configuration, in eval mode, its parameters on the meta device.

    Raises UnsupportedModel where transformers has none.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UnsupportedModel(f"model type '{config.model_type}' has no causal language model: {error}") from error
    return model.eval()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter that a module registers lands on the meta device; buffers stay real.

    Real buffers matter: rotary frequencies and embedding scales are computed at construction and are in no file.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
