"""What was measured of a model's experts, as one file: any ratio and any method is chosen from it without the text.

A safetensors file: `layers.N.tokens` and the other fields of `LayerStats`, `probe`, the first tokens of the text, and
under `crepe_deploy` of its metadata where it all came from, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from crepe_deploy.errors import CheckpointError, ConfigError
from crepe_deploy.store.checkpoint import read_header
from crepe_deploy.store.files import disk_errors
from crepe_deploy.store.manifest import Source, versions
from crepe_deploy.store.reading import parse_json

from .layers import ExpertLayers
from .measure import LayerStats

SCORES_NAME: Final = "scores.safetensors"
_RECORD: Final = "crepe_deploy"
_FIELDS: Final = [field.name for field in fields(LayerStats)]


@dataclass(frozen=True)
class Scores:
    """layers: by number. probe: int64 (1, tokens). calibration: its record. model: sha256 by file of what was measured.

    measured: how: the dtype of computation.
    """

    layers: Mapping[int, LayerStats]
    probe: Tensor
    calibration: dict[str, Any]
    model: dict[str, str]
    measured: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the file. Raises DiskFullError, OutputError."""
        record = {
            "what": "statistics of experts", "schema_version": 1, "versions": versions(), "model": self.model,
            "calibration": self.calibration, "measured": self.measured,
        }  # fmt: skip
        tensors = {
            f"layers.{index}.{name}": getattr(stats, name) for index, stats in self.layers.items() for name in _FIELDS
        }
        with disk_errors(path):
            save_file({**tensors, "probe": self.probe}, path, {_RECORD: json.dumps(record)})

    def require(self, path: Path, source: Source, layers: ExpertLayers, vocabulary: int) -> None:
        """Refuse scores of another model than this one. Raises ConfigError."""
        other = next((name for name, digest in source.files.items() if self.model.get(name) != digest), None)
        if other is not None or self.model.keys() != source.files.keys():
            raise ConfigError(f"{path} was measured on another model: {other or 'a file more'} differs; measure again")
        shape = torch.Size([layers.experts])
        if list(self.layers) != layers.indices or any(one.tokens.shape != shape for one in self.layers.values()):
            raise ConfigError(f"{path} does not hold every layer of the model that it names: measure again")
        if int(self.probe.min()) < 0 or int(self.probe.max()) >= vocabulary:
            raise ConfigError(f"{path}: its tokens are not of the model's vocabulary: measure again")


def load_scores(path: Path) -> Scores:
    """Read and check a file of `Scores.save`. Raises CheckpointError."""
    infos = read_header(path)
    try:
        with safe_open(str(path), "pt") as file:
            record = parse_json((file.metadata() or {}).get(_RECORD, "null"), path)
            tensors = {name: file.get_tensor(name) for name in infos}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("schema_version") != 1:
        raise CheckpointError(f"{path} is no file of scores that this crepe-deploy reads")
    try:
        numbers = sorted({int(name.split(".")[1]) for name in tensors if name != "probe"})
        layers = {
            index: LayerStats(**{name: tensors[f"layers.{index}.{name}"] for name in _FIELDS}) for index in numbers
        }
        scores = Scores(
            layers, tensors["probe"], dict(record["calibration"]), dict(record["model"]), dict(record["measured"])
        )
        _check(scores)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} is a damaged file of scores: {type(error).__name__} {error}") from error
    return scores


def _check(scores: Scores) -> None:
    """Raise ValueError for tensors that `save` would not have written."""
    if scores.probe.dtype != torch.int64 or scores.probe.ndim != 2 or len(scores.probe) != 1:
        raise ValueError("'probe' holds no tokens")
    for index, stats in scores.layers.items():
        count = stats.tokens.numel()
        for name in _FIELDS:
            tensor = getattr(stats, name)
            shape = (count, count) if name == "gram" else (count,)
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape or not tensor.isfinite().all():
                raise ValueError(f"'layers.{index}.{name}' is not of shape {shape}, or not finite")
