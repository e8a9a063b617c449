"""The scales of quantised weights, in a file beside the checkpoint that holds the weights themselves.

`values.safetensors` has for a weight NAME the tensor NAME_scales, (out, groups) in the weight's dtype, also where the
weight lies transposed; its metadata say the grid: bits, and group, the columns that share a scale ("": a whole row).
The weights are dense and code * scale already, so that what reads the checkpoint need not know of this file. It is not
in the index; where it is, there is an index, by which servers tell it from the weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crepe_deploy.errors import CheckpointError, NumericalError, VerifyError
from crepe_deploy.grid import BITS, Grid, codes_of

from .checkpoint import CheckpointReader, TensorInfo, read_header, require_inside
from .manifest import load_manifest
from .writing import Planned

VALUES_NAME: Final = "values.safetensors"
AGAIN: Final = (
    "by prune FOLDER --method magnitude --sparsity 16:32 --values int4, say: its zeros stay, being the smallest"
)
_SUFFIX: Final = "_scales"
_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


def scales_name(weight: str) -> str:
    """What the scales of the tensor `weight` are called."""
    return weight + _SUFFIX


def planned_scales(grid: Grid, out_features: int, in_features: int) -> Planned:
    """The scales of a weight (out, in), to be written."""
    return Planned(VALUES_NAME, grid.dtype, (out_features, -(-in_features // grid.width(in_features))))


def values_metadata(bits: int, group: int | None) -> dict[str, str]:
    """What the file says of its grid."""
    return {"format": "pt", "bits": str(bits), "group": "" if group is None else str(group)}


def read_values(folder: Path) -> dict[str, tuple[Grid, Tensor]]:
    """Grid and scales (out, groups) of every quantised weight of a checkpoint folder, by the weight's name.

    {} where the folder has none. That the weights are on their grids is for `grid.codes_of` to say.
    Raises CheckpointError for a file that does not fit the checkpoint beside it.
    """
    path = folder / VALUES_NAME
    if not path.exists() and not path.is_symlink():
        return {}
    require_inside(folder, path)
    weights, infos = CheckpointReader(folder), read_header(path)
    try:
        with safe_open(str(path), "pt") as file:
            bits, group = _grid(path, file.metadata() or {})
            found = {}
            for info in infos.values():
                grid = _checked(path, info, weights, bits, group)
                scales = file.get_tensor(info.name)
                if not bool((scales.isfinite() & (scales > 0)).all()):
                    raise CheckpointError(f"{path}: '{info.name}' holds scales that are not positive numbers")
                found[info.name.removesuffix(_SUFFIX)] = (grid, scales)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return found


def require_on_grid(name: str, weight: Tensor, grid: Grid, scales: Tensor) -> None:
    """Raise VerifyError unless weight (out, in) is code * scale in every bit."""
    fits = scales.shape == (weight.shape[0], -(-weight.shape[1] // grid.width(weight.shape[1])))
    try:
        if not fits:
            raise NumericalError(f"scales {tuple(scales.shape)} for a weight {tuple(weight.shape)}")
        codes_of(weight, scales.to(weight.device), grid)
    except NumericalError as error:
        raise VerifyError(f"{name}: {error}; {VALUES_NAME} is of other weights") from error


def check_values(folder: Path) -> None:
    """Compare every weight that has scales with them, one at a time, in a folder that has a manifest.

    Raises VerifyError naming a weight that is not on its grid, CheckpointError.
    """
    if values := read_values(folder):
        records, reader = load_manifest(folder).tensors, CheckpointReader(folder)
        for name, (grid, scales) in values.items():
            weight = reader.load(name)
            stored = records[name].transposed if name in records else False
            require_on_grid(name, weight.T if stored else weight, grid, scales)


def _grid(path: Path, metadata: Mapping[str, str]) -> tuple[int, int | None]:
    """Bits and group of the file's metadata."""
    bits, group = metadata.get("bits", ""), metadata.get("group")
    if bits not in map(str, BITS) or group is None or not re.fullmatch(r"|[1-9][0-9]{0,8}", group):
        raise CheckpointError(
            f"{path}: its metadata say bits {bits!r} and group {group!r}; there are bits "
            f"{' and '.join(map(str, BITS))}, and a group of columns, or '' for a scale for each row"
        )
    return int(bits), int(group) if group else None


def _checked(path: Path, info: TensorInfo, weights: CheckpointReader, bits: int, group: int | None) -> Grid:
    """The grid of one tensor of scales. Raises CheckpointError where there is no weight that it could be of."""
    name = info.name.removesuffix(_SUFFIX)
    if name == info.name or name not in weights:
        raise CheckpointError(f"{path}: '{info.name}' is of no weight of {path.parent}")
    weight = weights.info(name)
    if info.dtype not in _DTYPES or info.dtype != weight.dtype:
        raise CheckpointError(f"{path}: '{info.name}' is {info.dtype}, and its weight {weight.dtype}")
    grid = Grid(bits, group, info.dtype)
    fitting = [planned_scales(grid, *shape).shape for shape in (weight.shape, weight.shape[::-1]) if _matrix(shape)]
    if info.shape not in fitting:
        raise CheckpointError(f"{path}: '{info.name}' has the shape {info.shape}, which no weight {weight.shape} has")
    return grid


def _matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and math.prod(shape) > 0
