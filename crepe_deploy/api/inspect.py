"""`inspect`: what a folder's tensors really hold, by counting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from crepe_deploy.store.audit import inspect_folder
from crepe_deploy.structural.check import describe


class TensorRow(TypedDict):
    """One tensor as counted.

    pattern: the one that its manifest records where the count confirms it, else the finest N:M that every group of the
    input dimension holds, or None. sparsity: zeros over entries. axis: of an ONNX initialiser, the one reduced.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int
    sparsity: float
    pattern: str | None
    axis: NotRequired[int | None]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` counted. layers: the widths of each layer where layers may differ, else None."""

    folder: Path
    tensors: list[TensorRow]
    layers: list[dict[str, Any]] | None

    def to_dict(self) -> dict[str, Any]:
        """What the command prints with --json."""
        layers = {"layers": self.layers} if self.layers else {}
        return {"folder": str(self.folder), "tensors": self.tensors, **layers}


def inspect(folder: str | Path) -> Inspection:
    """Count the zeros of every tensor in a checkpoint or ONNX folder, one in memory at a time.

    Raises CheckpointError (exit code 2) for a folder that is none, MissingExtra (2) for ONNX without its libraries.
    """
    from crepe_deploy.exporting.onnx.inspect import inspect_onnx, is_onnx

    root = Path(folder)
    if is_onnx(root):
        return Inspection(root, cast(list[TensorRow], inspect_onnx(root)), None)
    return Inspection(root, cast(list[TensorRow], inspect_folder(root)), describe(root))
