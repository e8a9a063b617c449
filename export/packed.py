"""Export `packed`: pruned weights stored without their zeros, in the format `crepe-nm` (see docs/format.md).

Each packed `P.weight` becomes `P.weight_values` and `P.weight_mask`. Beside them stays an empty `P.weight`, a guard:
a reader that does not know the format meets a wrong shape and stops, where it would otherwise initialise the missing
weight with random numbers. Tensors stream through one at a time; the model is never whole in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError, ParityError
from ..model.decoder import Decoder
from ..packed.config import COLUMN_MULTIPLE, PackedConfig, packed_config
from ..packed.format import BITS, DTYPES, MASK_SUFFIX, VALUES_SUFFIX, mask_from_weight, pack, unpack, validate
from ..pattern import Pattern, parse_record
from ..progress import Progress, silent, ticker
from ..store.checkpoint import CheckpointReader, read_json
from ..store.companions import copy_companions
from ..store.files import require_disk, write_json
from ..store.manifest import MANIFEST_NAME, Manifest, TensorRecord, hash_folder, save_manifest, sha256_file, verify
from ..store.writing import CheckpointWriter, Planned
from .card import write_card
from .greedy import GREEDY_TOKENS, greedy_of

GUARD_SHAPE = (0,)

Tick = Callable[[], None]


def export_packed(source: Path, folder: Path, *, link: bool = False, step: Progress = silent) -> Manifest:
    """Pack a pruned checkpoint into the existing, empty `folder`, re-read and compare every bit, and record the size.

    link: nothing to do here; weights are always rewritten. step: told of every piece of work done.
    Raises VerifyError when the source differs from its manifest, ConfigError when its pattern cannot be packed,
    CheckpointError, ParityError.
    """
    parent = verify(source)
    if parent.format != "dense":
        raise ConfigError(f"{source} is a {parent.format} checkpoint; --format packed reads a dense one with zeros")
    config = patterns_of(source, parent)
    reader = CheckpointReader(source)
    packed, left = _choose(reader, parent, config)
    if not packed:
        raise ConfigError(
            f"{source}: none of its {len(left)} pruned tensors can be packed in pattern {config.pattern}: that needs "
            f"(out, in) matrices whose columns are a multiple of {COLUMN_MULTIPLE} and of the group. Use --format dense"
        )
    decoder = Decoder(source)
    config = packed_config(config.pattern, dense_modules(decoder, packed), _spelled(decoder, config, packed))
    plan = _plan(reader, packed, config)
    require_disk(folder, sum(planned.size_bytes for planned in plan.values()))
    tick = ticker(step, len(list(reader)) + len(packed) + GREEDY_TOKENS)
    _write(reader, folder, plan, packed, config, tick)
    copy_companions(source, folder)
    content = read_json(folder / "config.json")
    write_json(folder / "config.json", {**content, "quantization_config": config.to_dict()})
    _compare(reader, folder, packed, config, tick)
    metrics = {**parent.metrics, "size": _size(reader, folder, packed), "left_dense": left}
    metrics["greedy"] = greedy_of(source, parent, tick)
    update = {"stage": "export", "format": "packed", "parent": sha256_file(source / MANIFEST_NAME), "metrics": metrics}
    manifest = parent.model_copy(update=update)
    write_card(folder, manifest)
    manifest = manifest.model_copy(update={"files": hash_folder(folder)})
    save_manifest(folder, manifest)
    return manifest


def patterns_of(source: Path, manifest: Manifest) -> PackedConfig:
    """The most common pattern of the pruned tensors, and the others by module. Raises ConfigError for none."""
    if not manifest.tensors:
        raise ConfigError(f"{source}: none of its tensors is pruned; there is nothing to pack")
    patterns = {name.removesuffix(".weight"): parse_record(found.pattern) for name, found in manifest.tensors.items()}
    common = Counter(patterns.values()).most_common(1)[0][0]
    for pattern in patterns.values():
        packed_config(pattern)
    return packed_config(common, (), {name: pattern for name, pattern in patterns.items() if pattern != common})


def _spelled(decoder: Decoder, config: PackedConfig, packed: list[str]) -> dict[str, Pattern]:
    """The overrides of packed tensors by file name and, where the module is spelled otherwise, by module path."""
    paths = {
        spec.key.removesuffix(".weight"): f"{decoder.blocks_path}.{index}.{spec.path}"
        for index, specs in enumerate(decoder.linears)
        for spec in specs
    }
    kept = {key: pattern for key, pattern in config.overrides.items() if f"{key}.weight" in packed}
    return {name: pattern for key, pattern in kept.items() for name in (key, paths.get(key, key))}


def of_tensor(config: PackedConfig, name: str) -> PackedConfig:
    """The config of the packed weight `name`."""
    return config.of(name.removesuffix(".weight"))


def _choose(reader: CheckpointReader, parent: Manifest, config: PackedConfig) -> tuple[list[str], list[str]]:
    """The pruned tensors that are packed, and those that keep their zeros because the format cannot hold them."""
    packed: list[str] = []
    left: list[str] = []
    for name, record in parent.tensors.items():
        fits = _packable(name, record, config) and reader.info(name).dtype in DTYPES
        (packed if fits else left).append(name)
    return packed, left


def _packable(name: str, record: TensorRecord, config: PackedConfig) -> bool:
    return name.endswith(".weight") and not record.transposed and of_tensor(config, name).fits(record.shape[1])


def dense_modules(decoder: Decoder, packed: list[str]) -> list[str]:
    """Every linear module that stays dense, by module path and, where the file spells it otherwise, by file name."""
    names = {name for name, module in decoder.model.named_modules() if isinstance(module, torch.nn.Linear)}
    for index, specs in enumerate(decoder.linears):
        for spec in specs:
            if spec.key not in packed:
                names |= {f"{decoder.blocks_path}.{index}.{spec.path}", spec.key.removesuffix(".weight")}
    for name in list(names):
        if f"{name}.weight" not in decoder.reader and name not in (decoder.model.all_tied_weights_keys or {}):
            names |= _file_names(decoder, name)
    return sorted(names)


def _file_names(decoder: Decoder, module: str) -> set[str]:
    try:
        return {decoder.key(f"{module}.weight").removesuffix(".weight")}
    except CheckpointError:  # tied to another tensor, and so in no file
        return set()


def _plan(reader: CheckpointReader, packed: list[str], config: PackedConfig) -> dict[str, Planned]:
    """What is written, from headers alone: the source's shards and order, packed tensors in their place."""
    plan: dict[str, Planned] = {}
    chosen = set(packed)
    for info in reader:
        if info.name not in chosen:
            plan[info.name] = Planned(info.file.name, info.dtype, info.shape)
            continue
        rows, columns = info.shape
        n, m = of_tensor(config, info.name).geometry(columns)
        plan[info.name] = Planned(info.file.name, info.dtype, GUARD_SHAPE)
        plan[info.name + VALUES_SUFFIX] = Planned(info.file.name, info.dtype, (rows, columns // m * n))
        plan[info.name + MASK_SUFFIX] = Planned(info.file.name, torch.uint8, (rows, columns // 8))
    return plan


def _write(
    reader: CheckpointReader,
    folder: Path,
    plan: dict[str, Planned],
    packed: list[str],
    config: PackedConfig,
    tick: Tick,
) -> None:
    chosen = set(packed)
    with CheckpointWriter(folder, plan) as writer:
        for info in reader:
            tensor = reader.load(info.name)
            if info.name in chosen:
                n, m = of_tensor(config, info.name).geometry(info.shape[1])
                values, mask = pack(tensor, mask_from_weight(tensor, n, m, info.name), info.name)
                writer.write(info.name + VALUES_SUFFIX, values)
                writer.write(info.name + MASK_SUFFIX, mask)
                tensor = torch.empty(GUARD_SHAPE, dtype=info.dtype)
            writer.write(info.name, tensor)
            tick()


def _compare(reader: CheckpointReader, folder: Path, packed: list[str], config: PackedConfig, tick: Tick) -> None:
    """Re-read every packed tensor and compare it bit by bit with the source's. Raises ParityError, CheckpointError."""
    written = CheckpointReader(folder)
    for name in packed:
        weight = reader.load(name)
        values, mask = load_packed(written, name, config)
        if not same_bits(unpack(values, mask), weight):
            raise ParityError(f"{folder}: '{name}' unpacks to other bits than {reader.root} holds")
        tick()


def load_packed(reader: CheckpointReader, name: str, config: PackedConfig) -> tuple[Tensor, Tensor]:
    """The stored pair of the packed weight `name`, checked against the pattern. Raises CheckpointError."""
    values, mask = reader.load_finite(name + VALUES_SUFFIX), reader.load(name + MASK_SUFFIX)
    if mask.ndim != 2:
        raise CheckpointError(f"{name}{MASK_SUFFIX}: shape {tuple(mask.shape)}; a packed mask has two dimensions")
    rows, columns = mask.shape[0], mask.shape[1] * 8
    n, m = of_tensor(config, name).geometry(columns)
    validate(values, mask, n, m, columns, rows, name)
    return values, mask


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Equal in dtype, shape and every bit, signs of zeros included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    kind = BITS[first.element_size()]
    return torch.equal(first.contiguous().view(kind), second.contiguous().view(kind))


def _size(reader: CheckpointReader, folder: Path, packed: list[str]) -> dict[str, Any]:
    written = CheckpointReader(folder)
    parts = [written.info(name + suffix) for name in packed for suffix in (VALUES_SUFFIX, MASK_SUFFIX)]
    dense_bytes = sum(reader.info(name).size_bytes for name in packed)
    before, after = (sum(path.stat().st_size for path in found.files) for found in (reader, written))
    return {
        "weight_bytes_over_dense": sum(part.size_bytes for part in parts) / dense_bytes,
        "file_bytes_over_dense": after / before,
        "packed_tensors": len(packed),
        "what": "bytes of the packed linear layers, and of all weight files, over the same stored dense",
    }
