"""ONNX Runtime on the CPU: portable graphs in itself, genai folders through onnxruntime-genai."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, ConfigError
from .base import Prompts, Settings, check_lengths, check_options


class OnnxEngine:
    """A graph that `export --format onnx` wrote, greedy, its cache kept in the runtime."""

    @classmethod
    def require(cls, options: dict[str, Any]) -> None:
        """Raise MissingExtra without ONNX Runtime, ConfigError for any option: there are none."""
        from ..ort import require_onnx

        require_onnx("portable", "measuring an ONNX folder")
        check_options("onnxruntime", options, ())

    def __init__(self, folder: Path, settings: Settings) -> None:
        from ...store.manifest import load_manifest
        from ..ort import is_onnx, load_runner

        if not is_onnx(folder):
            raise CheckpointError(f"{folder} holds no ONNX graph; crepe-deploy export --format onnx writes one")
        self.folder = folder
        self.record: dict[str, Any] = load_manifest(folder).metrics["onnx"]
        if settings.dtype not in ("auto", self._dtype()):
            raise ConfigError(
                f"{folder} computes in {self._dtype()}, which an ONNX graph fixes; {settings.dtype} asked"
            )
        self.runner = load_runner(folder, settings.max_tokens, settings.threads)

    def generate(self, prompts: Prompts, tokens: int) -> list[float]:
        """Continue prompts in one batch, equally long ones where the graph takes no padding."""
        chosen = self.runner.start(prompts).argmax(-1).tolist()
        times = [time.perf_counter()]
        while len(times) < tokens:
            chosen = self.runner.step(chosen).argmax(-1).tolist()
            times.append(time.perf_counter())
        check_lengths([len(times)] * len(chosen), tokens)
        return times

    def describe(self) -> dict[str, Any]:
        """The runtime repacks weights as it likes and does not say how many bytes they take."""
        kernels = {"flavor": {"all": self.record["flavor"]}}
        return {
            "dtype": self._dtype(),
            "linear_bytes": None,
            "linears": self.record["sparsity"]["of"],
            "kernels": kernels,
        }

    def close(self) -> None:
        """Let the runtime go."""
        del self.runner

    def _dtype(self) -> str:
        return {"fp32": "float32", "fp16": "float16"}.get(self.record["precision"], str(self.record["precision"]))
