"""Export `packed`: pruned weights stored without their zeros, in the format `crepe-nm` (see docs/format.md).

Each packed `P.weight` becomes `P.weight_values` and `P.weight_mask`. Beside them stays an empty `P.weight`, a guard:
a reader that does not know the format meets a wrong shape and stops, where it would otherwise initialise the missing
weight with random numbers. Tensors stream through one at a time; the model is never whole in memory.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, ParityError, UnsupportedModel
from ...model.decoder import Decoder, refuse_experts
from ...packed.config import COLUMN_MULTIPLE, PackedConfig, packed_config
from ...packed.format import (
    DTYPES,
    MASK_SUFFIX,
    VALUES_SUFFIX,
    mask_from_weight,
    pack,
    unpack,
    validate,
)
from ...pattern import Pattern, parse_record
from ...store.checkpoint import CheckpointReader, read_config, same_bits
from ...store.companions import copy_companions
from ...store.files import require_disk, write_json
from ...store.folders import scratch_folder
from ...store.manifest import Manifest, TensorRecord
from ...store.pieces import Pieces
from ...store.readback import prove_written
from ...store.writing import CheckpointWriter, Planned
from ..frame import usage
from ..frame.exporter import Exporter, Source, Tick, Words, Written
from ..frame.foreign import counted
from ..frame.greedy import GREEDY_TOKENS, greedy_of

GUARD_SHAPE = (0,)


@dataclass(frozen=True)
class PackedPlan:
    """tensors: what will be written. packed, left: names of the pruned weights that are packed, and that are not."""

    source: Source
    reader: CheckpointReader
    config: PackedConfig
    tensors: dict[str, Planned]
    packed: list[str]
    left: list[str]


@dataclass(frozen=True)
class Packed(Exporter[PackedPlan]):
    """Pruned weights without their zeros; what cannot be packed stays dense and is listed."""

    name: ClassVar[str] = "packed"
    words: ClassVar[Words] = Words(
        "The pruned weights are stored without their zeros, in the format `crepe-nm`: smaller on disk and in memory. "
        "transformers (after `import crepe_deploy`) and vLLM (by itself, once crepe-deploy is installed) run it from "
        "the packed weights on CPUs and NVIDIA GPUs; no GPU speed has been measured, so none is claimed. Readers "
        "without crepe-deploy refuse it. `crepe-deploy export --format dense` gives the "
        "plain folder back, bit by bit.",
        use=usage.OURS,
    )

    needs_manifest: ClassVar[bool] = False

    def foreign(self, folder: Path) -> Manifest:
        """Of a folder pruned elsewhere, the patterns that its layers hold."""
        return counted(folder)

    def check_pruning(self, model: Path, pattern: Pattern) -> None:
        packed_config(pattern)
        refuse_experts(model)

    def plan(self, source: Source, weights: Path) -> PackedPlan:
        config = patterns_of(weights, source.manifest)
        decoder = Decoder(weights)
        packed, left = _choose(decoder.reader, source.manifest, config)
        if not packed:
            raise ConfigError(
                f"{weights}: none of its {len(left)} pruned tensors can be packed in pattern {config.pattern}: that "
                f"needs (out, in) matrices whose columns are a multiple of {COLUMN_MULTIPLE} and of the group. Use "
                "--format dense"
            )
        _check_reads(decoder, packed)
        config = packed_config(config.pattern, dense_modules(decoder, packed), _spelled(decoder, config, packed))
        return PackedPlan(source, decoder.reader, config, _plan(decoder.reader, packed, config), packed, left)

    def room(self, plan: PackedPlan) -> int:
        return sum(planned.size_bytes for planned in plan.tensors.values())

    def steps(self, plan: PackedPlan) -> int:
        return len(plan.reader.tensors) + len(plan.tensors) + GREEDY_TOKENS

    def write(self, plan: PackedPlan, folder: Path, tick: Tick, pieces: Pieces) -> Written:
        chosen = set(plan.packed)
        with CheckpointWriter(folder, plan.tensors, pieces=pieces) as writer:
            for info in writer.left(plan.reader, tick):
                tensor = plan.reader.load(info.name)
                if info.name in chosen:
                    _write_packed(writer, info.name, tensor, plan.config)
                    tensor = torch.empty(GUARD_SHAPE, dtype=info.dtype)
                writer.write(info.name, tensor)
                tick()
        return Written(fingerprints=writer.fingerprints)

    def companions(self, plan: PackedPlan, weights: Path, folder: Path) -> None:
        super().companions(plan, weights, folder)
        content = read_config(folder)
        write_json(folder / "config.json", {**content, "quantization_config": plan.config.to_dict()})

    def compare(self, plan: PackedPlan, written: Written, folder: Path, tick: Tick) -> Written:
        hashes = prove_written(folder, written.fingerprints, tick)
        greedy = greedy_of(plan.source.folder, plan.source.manifest, tick)
        return replace(written, hashes=hashes, metrics={"left_dense": plan.left, "greedy": greedy})

    def size(self, plan: PackedPlan, folder: Path) -> Mapping[str, Any]:
        written = CheckpointReader(folder)
        parts = [written.info(name + suffix) for name in plan.packed for suffix in (VALUES_SUFFIX, MASK_SUFFIX)]
        dense_bytes = sum(plan.reader.info(name).size_bytes for name in plan.packed)
        before, after = (sum(path.stat().st_size for path in reader.files) for reader in (plan.reader, written))
        return {
            "weight_bytes_over_dense": sum(part.size_bytes for part in parts) / dense_bytes,
            "file_bytes_over_dense": after / before,
            "packed_tensors": len(plan.packed),
            "what": "bytes of the packed linear layers, and of all weight files, over the same stored dense",
        }


def patterns_of(source: Path, manifest: Manifest) -> PackedConfig:
    """The most common pattern of the pruned tensors, and the others by module. Raises ConfigError for none."""
    if not manifest.tensors:
        raise ConfigError(f"{source}: none of its tensors is pruned; there is nothing to pack")
    patterns = {name.removesuffix(".weight"): parse_record(record.pattern) for name, record in manifest.tensors.items()}
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
        record.check_shape(name, reader.info(name).shape)
        fits = _packable(name, record, config) and reader.info(name).dtype in DTYPES
        (packed if fits else left).append(name)
    return packed, left


def _check_reads(decoder: Decoder, packed: list[str]) -> None:
    """Raise UnsupportedModel where the model's code reads the weight of a layer that would have none any more."""
    for index, specs in enumerate(decoder.linears):
        for spec in specs:
            if spec.key in packed and f"{decoder.blocks_path}.{index}.{spec.path}" in decoder.reads:
                raise UnsupportedModel(
                    f"the code of '{decoder.config.model_type}' reads '{spec.key}' beside calling its layer, so it "
                    "cannot run packed; use --format dense"
                )


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


def _write_packed(writer: CheckpointWriter, name: str, weight: Tensor, config: PackedConfig) -> None:
    """Write both parts of one weight. Raises ParityError unless they unpack to its bits, PatternError."""
    n, m = of_tensor(config, name).geometry(weight.shape[1])
    values, mask = pack(weight, mask_from_weight(weight, n, m, name), name)
    if not same_bits(unpack(values, mask), weight):
        raise ParityError(f"{writer.root}: '{name}' unpacks to other bits than were packed")
    writer.write(name + VALUES_SUFFIX, values)
    writer.write(name + MASK_SUFFIX, mask)


def load_packed(reader: CheckpointReader, name: str, config: PackedConfig) -> tuple[Tensor, Tensor]:
    """The stored pair of the packed weight `name`, checked against the pattern. Raises CheckpointError."""
    values, mask = reader.load_finite(name + VALUES_SUFFIX), reader.load(name + MASK_SUFFIX)
    if mask.ndim != 2:
        raise CheckpointError(f"{name}{MASK_SUFFIX}: shape {tuple(mask.shape)}; a packed mask has two dimensions")
    rows, columns = mask.shape[0], mask.shape[1] * 8
    n, m = of_tensor(config, name).geometry(columns)
    validate(values, mask, n, m, columns, rows, name)
    return values, mask


@dataclass(frozen=True)
class Unpacking:
    """A packed checkpoint about to be written dense. content: the dense `config.json`. packed: names of the weights."""

    reader: CheckpointReader
    config: PackedConfig
    content: dict[str, Any]
    plan: dict[str, Planned]
    packed: set[str]

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, or these, dense. Raises CheckpointError naming one that does not fit the pattern."""
        for name in self.plan if names is None else names:
            if name in self.packed:
                yield name, unpack(*load_packed(self.reader, name, self.config))
            else:
                yield name, self.reader.load_finite(name)


def plan_unpacking(source: Path, records: Mapping[str, TensorRecord]) -> Unpacking:
    """From headers alone. records: the manifest's, of tensors that must be there.

    Raises CheckpointError naming the tensor that is missing, ConfigError.
    """
    content = read_config(source)
    config = PackedConfig.from_dict(content.pop("quantization_config", None) or {})
    reader = CheckpointReader(source)
    packed = packed_names(reader)
    for name in sorted(packed & {f"{module}.weight" for module in config.ignore}):
        raise CheckpointError(
            f"{source}: '{name}' is stored packed and quantization_config says in 'ignore' that it is not"
        )
    plan: dict[str, Planned] = {}
    for info in reader:
        base = info.name.removesuffix(VALUES_SUFFIX).removesuffix(MASK_SUFFIX)
        if base not in packed:
            plan[info.name] = Planned(info.file.name, info.dtype, info.shape)
        elif info.name.endswith(VALUES_SUFFIX):
            rows, mask_bytes = _matrix(reader, base + MASK_SUFFIX)
            plan[base] = Planned(info.file.name, info.dtype, (rows, mask_bytes * 8))
    for name in records:
        if name not in plan:
            raise CheckpointError(f"{source}: tensor '{name}' is missing")
    return Unpacking(reader, config, content, plan, packed)


def write_unpacked(unpacking: Unpacking, folder: Path, pieces: Pieces | None = None) -> dict[str, str]:
    """Write the dense tensors into `folder`, which is empty but for `pieces`, one at a time; their fingerprints.

    Raises CheckpointError naming the tensor that is inconsistent with the pattern.
    """
    with CheckpointWriter(folder, unpacking.plan, fingerprint=True, pieces=pieces) as writer:
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
