"""Whether a structurally pruned checkpoint holds what its `config.json` promises, read from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crepe_deploy.errors import VerifyError
from crepe_deploy.store.checkpoint import CheckpointReader, TensorInfo, read_config
from crepe_deploy.store.manifest import Manifest

from .layout import is_per_layer, layer_shapes, layer_widths

_PREFIXES = ("model.", "")


def is_structural(manifest: Manifest) -> bool:
    """Whether the checkpoint was written by structural pruning, as its manifest says."""
    return "structural" in manifest.config


def check_shapes(folder: Path) -> None:
    """Compare every layer's matrices and their biases with `config.json`.

    Raises VerifyError naming the tensor that is missing, has another shape or belongs to no layer; CheckpointError for
    a configuration or an index that cannot be read.
    """
    reader = CheckpointReader(folder)
    shapes = layer_shapes(read_config(folder))
    for index, layer in enumerate(shapes):
        for path, expected in layer.items():
            info = _find(reader, f"layers.{index}.{path}")
            _compare(info, expected)
            bias = info.name.removesuffix("weight") + "bias"
            if bias in reader:
                _compare(reader.info(bias), expected[:1])
    for name in reader.tensors:
        number = name.removeprefix("model.").removeprefix("layers.").partition(".")[0]
        if "layers." in name and number.isdigit() and int(number) >= len(shapes):
            raise VerifyError(f"{folder}: tensor '{name}' belongs to layer {number}, and config.json has {len(shapes)}")


def _find(reader: CheckpointReader, name: str) -> TensorInfo:
    for prefix in _PREFIXES:
        if prefix + name in reader:
            return reader.info(prefix + name)
    raise VerifyError(f"{reader.root}: tensor 'model.{name}' is missing; config.json has such a layer")


def _compare(info: TensorInfo, expected: tuple[int, ...]) -> None:
    if info.shape != expected:
        raise VerifyError(f"{info.file}: '{info.name}' has shape {info.shape}, and config.json asks for {expected}")


def describe(folder: Path) -> list[dict[str, Any]] | None:
    """The widths of each layer of a folder whose layers may differ; None for all others. Raises CheckpointError."""
    if not (folder / "config.json").is_file():
        return None
    content = read_config(folder)
    if not is_per_layer(content):
        return None
    return [{"layer": index, **widths._asdict()} for index, widths in enumerate(layer_widths(content))]
