"""Engines that can be measured, by name. An engine is one file here and one line in `ENGINES`."""

from __future__ import annotations

from typing import Final

from ...errors import ConfigError
from ...nearest import meant
from .base import Engine
from .fake import FakeEngine
from .onnxruntime import OnnxEngine
from .transformers import TransformersEngine
from .vllm import VllmEngine

ENGINES: Final[dict[str, type[Engine]]] = {
    "vllm": VllmEngine,
    "transformers": TransformersEngine,
    "onnxruntime": OnnxEngine,
    "fake": FakeEngine,
}


def get_engine(name: str) -> type[Engine]:
    """The engine of this name. Raises ConfigError listing those there are."""
    if name not in ENGINES:
        raise ConfigError(f"no engine '{name}'; there are {', '.join(ENGINES)}{meant(name, ENGINES)}")
    return ENGINES[name]
