"""The supernet on disk: every layer's levels as safetensors, hashed, written whole or not at all, read one at a time.

    FOLDER/layer-0007/attention-2x3.safetensors    groups (g,), queries (g, q) int32, columns (kept,) int32, weight
    FOLDER/layer-0007/ffn-768.safetensors          columns (768,) int32, weight (hidden, 768)
    FOLDER/layer-0007/levels.json                  sha256 of each file; written last: with it the layer is complete

Only kept columns and their refit weights are stored, never a masked tensor of full size.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crepe_deploy.device import CPU
from crepe_deploy.errors import CheckpointError, CrepeError, VerifyError
from crepe_deploy.store.files import disk_errors, write_json
from crepe_deploy.store.manifest import sha256_file
from crepe_deploy.store.reading import read_object
from crepe_deploy.store.work import LAYER_DONE

from .levels import AttentionSize, Level
from .plan import Geometry

HEADER_BYTES = 4096


@dataclass(frozen=True)
class LayerLevels:
    """The levels to build of one layer, ascending, and which one is in the middle."""

    attention: tuple[AttentionSize, ...]
    neurons: tuple[int, ...]
    attention_centre: AttentionSize
    neuron_centre: int

    def files(self) -> list[str]:
        """The file of every level."""
        return [*map(attention_file, self.attention), *map(neuron_file, self.neurons)]


def attention_file(size: AttentionSize) -> str:
    """The file name of an attention level."""
    return f"attention-{size[0]}x{size[1]}.safetensors"


def neuron_file(size: int) -> str:
    """The file name of an FFN level."""
    return f"ffn-{size}.safetensors"


def planned_bytes(geometry: Geometry, wanted: Sequence[LayerLevels], itemsize: int) -> int:
    """Bytes of a whole supernet with weights of `itemsize` bytes, file headers included."""
    columns = sum(
        sum(groups * queries * geometry.head_dim for groups, queries in layer.attention) + sum(layer.neurons)
        for layer in wanted
    )
    files = sum(len(layer.files()) + 1 for layer in wanted)
    return columns * (geometry.hidden * itemsize + 4) + files * HEADER_BYTES


@dataclass
class Store:
    """One iteration's supernet in `folder`. Every file's hash is compared once, before its first use.

    device: where levels are wanted that are read.
    """

    folder: Path
    device: torch.device = CPU
    _trusted: set[Path] = field(default_factory=set)
    _hashes: dict[int, dict[str, str]] = field(default_factory=dict)

    def layer(self, index: int) -> Path:
        """The folder of one layer."""
        return self.folder / f"layer-{index:04d}"

    def write(self, index: int, attention: Mapping[AttentionSize, Level], neurons: Mapping[int, Level]) -> None:
        """Write all levels of a layer in place of what is there. Raises DiskFullError, OutputError."""
        place = self.layer(index)
        with disk_errors(place):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        named = {attention_file(size): level for size, level in attention.items()}
        named |= {neuron_file(size): level for size, level in neurons.items()}
        for name, level in named.items():
            with disk_errors(place / name):
                save_file(_tensors(level), str(place / name))
        hashes = {name: sha256_file(place / name) for name in named}
        write_json(place / LAYER_DONE, {"files": hashes})
        self._hashes[index] = hashes
        self._trusted |= {place / name for name in named}

    def damage(self, index: int, wanted: LayerLevels) -> str | None:
        """Why a layer must be built: what is missing or damaged, by name; None where all levels are whole."""
        place = self.layer(index)
        if not (place / LAYER_DONE).is_file():
            return f"{place} is not complete"
        try:
            hashes = self._layer_hashes(index)
            for name in wanted.files():
                self._check(place / name, hashes)
        except (CheckpointError, VerifyError) as error:
            return str(error)
        return None

    def attention(self, index: int, size: AttentionSize) -> Level:
        """Read one attention level. Raises VerifyError naming a damaged file and how to rebuild it."""
        tensors = self._load(index, attention_file(size))
        groups = tuple(tensors["groups"].tolist())
        queries = tuple(tuple(row) for row in tensors["queries"].tolist())
        return Level(tensors["columns"].long(), tensors["weight"], groups, queries)

    def neurons(self, index: int, size: int) -> Level:
        """Read one FFN level. Raises VerifyError naming a damaged file and how to rebuild it."""
        tensors = self._load(index, neuron_file(size))
        return Level(tensors["columns"].long(), tensors["weight"])

    def _load(self, index: int, name: str) -> dict[str, Tensor]:
        path = self.layer(index) / name
        try:
            self._check(path, self._layer_hashes(index))
            tensors: dict[str, Tensor] = load_file(str(path))
        except (CheckpointError, VerifyError, SafetensorError, OSError, RuntimeError) as error:
            raise VerifyError(f"{error}: the same command with --resume rebuilds this level") from error
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _layer_hashes(self, index: int) -> dict[str, str]:
        if index not in self._hashes:
            files = read_object(self.layer(index) / LAYER_DONE).get("files")
            if not isinstance(files, dict):
                raise VerifyError(f"{self.layer(index) / LAYER_DONE} names no files")
            self._hashes[index] = files
        return self._hashes[index]

    def _check(self, path: Path, hashes: Mapping[str, str]) -> None:
        if path in self._trusted:
            return
        if path.name not in hashes or not path.is_file():
            raise VerifyError(f"{path} is missing from the supernet")
        if sha256_file(path) != hashes[path.name]:
            raise VerifyError(f"{path} differs from the hash it was written with")
        self._trusted.add(path)

    def remove(self) -> None:
        """Delete the folder and all levels in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _tensors(level: Level) -> dict[str, Tensor]:
    if not torch.isfinite(level.weight).all():
        raise CrepeError("a refit weight is not finite")
    tensors = {"columns": level.columns.to(torch.int32), "weight": level.weight.contiguous()}
    if level.groups:
        tensors["groups"] = torch.tensor(level.groups, dtype=torch.int32)
        tensors["queries"] = torch.tensor(level.queries, dtype=torch.int32)
    return {name: tensor.cpu() for name, tensor in tensors.items()}
