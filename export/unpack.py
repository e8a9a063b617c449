"""Back from a packed checkpoint to dense with explicit zeros, bit by bit what was packed."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..packed.config import PackedConfig
from ..packed.format import MASK_SUFFIX, VALUES_SUFFIX, unpack
from ..store.checkpoint import CheckpointReader, read_json
from ..store.companions import copy_companions
from ..store.files import require_disk, write_json
from ..store.manifest import Manifest
from ..store.writing import CheckpointWriter, Planned
from .packed import load_packed


def unpack_checkpoint(source: Path, folder: Path, manifest: Manifest) -> None:
    """Write the packed checkpoint `source` as a dense one into the empty `folder`, tensor by tensor.

    Raises CheckpointError naming the tensor that is missing or inconsistent with the pattern.
    """
    content = read_json(source / "config.json")
    config = PackedConfig.from_dict(content.pop("quantization_config", None) or {})
    reader = CheckpointReader(source)
    packed = packed_names(reader)
    plan: dict[str, Planned] = {}
    for info in reader:
        base = info.name.removesuffix(VALUES_SUFFIX).removesuffix(MASK_SUFFIX)
        if base not in packed:
            plan[info.name] = Planned(info.file.name, info.dtype, info.shape)
        elif info.name.endswith(VALUES_SUFFIX):
            rows, mask_bytes = _matrix(reader, base + MASK_SUFFIX)
            plan[base] = Planned(info.file.name, info.dtype, (rows, mask_bytes * 8))
    for name in manifest.tensors:
        if name not in plan:
            raise CheckpointError(f"{source}: tensor '{name}' is missing")
    require_disk(folder, sum(planned.size_bytes for planned in plan.values()))
    with CheckpointWriter(folder, plan) as writer:
        for name in plan:
            writer.write(name, unpack(*load_packed(reader, name, config)) if name in packed else reader.load(name))
    copy_companions(source, folder)
    write_json(folder / "config.json", content)


def packed_names(reader: CheckpointReader) -> set[str]:
    """The dense names of all packed tensors. Raises CheckpointError naming the part that is missing."""
    stored = set(reader.tensors)
    names = {name.removesuffix(suffix) for suffix in (VALUES_SUFFIX, MASK_SUFFIX) for name in stored
             if name.endswith(suffix)}  # fmt: skip
    for name in sorted(names):
        for suffix in (VALUES_SUFFIX, MASK_SUFFIX):
            reader.info(name + suffix)
    return names


def _matrix(reader: CheckpointReader, name: str) -> tuple[int, int]:
    shape = reader.info(name).shape
    if len(shape) != 2:
        raise CheckpointError(f"{name}: shape {shape}; a packed mask has two dimensions")
    return shape[0], shape[1]
