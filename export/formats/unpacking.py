"""Packed checkpoints read: every weight dense again, to the bit as it was packed, one at a time.

What stands for a weight is checked against the pattern and the values that `config.json` gives it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import CheckpointError
from ...packed import parts
from ...packed.coded import SCALES_SUFFIX
from ...packed.config import PackedConfig
from ...packed.format import MASK_SUFFIX, VALUES_SUFFIX
from ...store.checkpoint import CheckpointReader, read_config
from ...store.companions import copy_companions
from ...store.files import require_disk, write_json
from ...store.folders import scratch_folder
from ...store.manifest import TensorRecord
from ...store.pieces import Pieces
from ...store.values import VALUES_NAME, scales_name, values_metadata
from ...store.writing import CheckpointWriter, Planned
from ..frame.exporter import Source


def load_packed(reader: CheckpointReader, name: str, config: PackedConfig) -> Tensor:
    """The packed weight `name`, dense, its parts checked. Raises CheckpointError naming the one that is wrong."""
    of = config.of(name.removesuffix(".weight"))
    found = {}
    for suffix in stored_suffixes(reader, name, of):
        found[suffix] = (reader.load_finite if suffix == VALUES_SUFFIX else reader.load)(name + suffix)
    _, columns = parts.checked(found, of, name)
    return parts.dense(found, of, columns)


def stored_suffixes(reader: CheckpointReader, name: str, config: PackedConfig) -> tuple[str, ...]:
    """The parts that the packed weight `name` is stored in. Raises CheckpointError naming one that is missing."""
    all_kept = config.values is not None and name + MASK_SUFFIX not in reader
    for suffix in (found := parts.suffixes(config, all_kept)):
        reader.info(name + suffix)
    return found


@dataclass(frozen=True)
class Unpacking:
    """A packed checkpoint about to be written dense. content: the dense `config.json`. packed: names of the weights.

    plan: of the dense tensors and, where they were asked for, of the scales of coded values, a file beside them.
    """

    reader: CheckpointReader
    config: PackedConfig
    content: dict[str, Any]
    plan: dict[str, Planned]
    packed: set[str]

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, or these, dense. Raises CheckpointError naming one that does not fit the pattern."""
        for name in self.plan if names is None else names:
            if name in self.packed:
                yield name, load_packed(self.reader, name, self.config)
            else:
                yield name, self.reader.load_finite(name)


def plan_unpacking(source: Path, records: Mapping[str, TensorRecord], *, scales: bool = False) -> Unpacking:
    """From headers alone. records: the manifest's, of tensors that must be there. scales: those of coded values too.

    Raises CheckpointError naming the tensor that is missing, ConfigError.
    """
    content = read_config(source)
    config = PackedConfig.from_dict(content.pop("quantization_config", None) or {})
    reader = CheckpointReader(source)
    packed = packed_names(reader, config)
    for name in sorted(packed & {f"{module}.weight" for module in config.ignore}):
        raise CheckpointError(
            f"{source}: '{name}' is stored packed and quantization_config says in 'ignore' that it is not"
        )
    plan: dict[str, Planned] = {}
    for info in reader:
        base, suffix = _split(info.name, config)
        if base not in packed:
            plan[info.name] = Planned(info.file.name, info.dtype, info.shape)
        elif suffix in (VALUES_SUFFIX, SCALES_SUFFIX):
            of = config.of(base.removesuffix(".weight"))
            shapes = {part: reader.info(base + part).shape for part in stored_suffixes(reader, base, of)}
            plan[base] = Planned(info.file.name, info.dtype, parts.shape_of(shapes, of, base))
            if scales and suffix == SCALES_SUFFIX:
                plan[scales_name(base)] = Planned(VALUES_NAME, info.dtype, info.shape)
    for name in records:
        if name not in plan:
            raise CheckpointError(f"{source}: tensor '{name}' is missing")
    return Unpacking(reader, config, content, plan, packed)


def write_unpacked(unpacking: Unpacking, folder: Path, pieces: Pieces | None = None) -> dict[str, str]:
    """Write the dense tensors into `folder`, which is empty but for `pieces`, one at a time; their fingerprints.

    Raises CheckpointError naming the tensor that is inconsistent with the pattern.
    """
    values = unpacking.config.values
    beside = {} if values is None else {VALUES_NAME: values_metadata(values.bits, values.group)}
    with CheckpointWriter(folder, unpacking.plan, fingerprint=True, pieces=pieces, beside=beside) as writer:
        for name, tensor in unpacking.tensors(writer.pending):
            writer.write(name, tensor)
    return writer.fingerprints


@contextlib.contextmanager
def as_dense(source: Source, beside: Path) -> Iterator[Path]:
    """The folder of a dense source; of a packed one a dense copy without a manifest, which is removed after."""
    if source.manifest.format != "packed":
        yield source.folder
        return
    with scratch_folder(beside.with_name(beside.name + ".unpacked")) as copy:
        unpacking = plan_unpacking(source.folder, source.manifest.tensors)
        require_disk(copy, sum(planned.size_bytes for planned in unpacking.plan.values()))
        write_unpacked(unpacking, copy)
        copy_companions(source.folder, copy)
        write_json(copy / "config.json", unpacking.content)
        yield copy


def unpacked(folder: Path) -> Iterator[tuple[str, Tensor, bool]]:
    """Every tensor of a packed checkpoint, dense, one at a time: its name, itself, and whether it is stored packed.

    Raises CheckpointError naming what is missing or inconsistent.
    """
    unpacking = plan_unpacking(folder, {})
    for name, tensor in unpacking.tensors():
        yield name, tensor, name in unpacking.packed


def packed_names(reader: CheckpointReader, config: PackedConfig) -> set[str]:
    """The dense names of all packed tensors. Raises CheckpointError naming the part that is missing."""
    names = {base for base, suffix in (_split(name, config) for name in reader.tensors) if suffix}
    for name in sorted(names):
        stored_suffixes(reader, name, config)
    return names


def _split(name: str, config: PackedConfig) -> tuple[str, str]:
    """The weight that a tensor is a part of, and which part; itself and none where it is no part."""
    for suffix in parts.suffixes(config, all_kept=False):
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""
