"""Packages that come with an extra of crepe-deploy: whether they are there, and what to install where they are not."""

from __future__ import annotations

import importlib.util
from typing import Final

from .errors import MissingExtra

# Module: its package, and the extra that brings it; a test compares them with pyproject.toml.
EXTRAS: Final = {
    "accelerate": ("accelerate", "heal"),
    "cmaes": ("cmaes", "search"),
    "datasets": ("datasets", "eval"),
    "gguf": ("gguf", "gguf"),
    "jinja2": ("jinja2", "bench"),
    "lm_eval": ("lm-eval", "eval"),
    "matplotlib": ("matplotlib", "bench"),
    "mwparserfromhell": ("mwparserfromhell", "bench"),
    "onnx": ("onnx", "onnx"),
    "onnxruntime": ("onnxruntime", "onnx"),
    "onnxruntime_genai": ("onnxruntime-genai", "onnx"),
    "onnxscript": ("onnxscript", "onnx"),
    "peft": ("peft", "heal"),
    "pyarrow": ("pyarrow", "eval"),
    "starlette": ("starlette", "onnx"),
    "triton": ("triton", "gpu"),
    "uvicorn": ("uvicorn", "onnx"),
    "vllm": ("vllm", "vllm"),
}


def require(purpose: str, *modules: str, extra: str | None = None) -> None:
    """Raise MissingExtra unless all these modules can be imported.

    purpose: what needs them, as the subject of a sentence. extra: where it is another than the table's.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        *first, last = (EXTRAS[module][0] for module in missing)
        packages = f"{', '.join(first)} and {last}" if first else last
        raise MissingExtra(packages, extra or EXTRAS[missing[0]][1], purpose)
