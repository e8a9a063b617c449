"""Export `packed`: pruned weights stored without their zeros, in the format `crepe-nm` (see docs/format.md).

Each packed `P.weight` becomes `P.weight_values` and `P.weight_mask`, or, where its folder has the scales of its values,
`P.weight_codes`, `P.weight_scales` and a mask. Beside them stays an empty `P.weight`, a guard: a reader that does not
know the format meets a wrong shape and stops, where it would otherwise initialise the missing weight with random
numbers. Tensors stream through one at a time; the model is never whole in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError, NumericalError, ParityError, UnsupportedModel
from ...model.decoder import Decoder, refuse_experts
from ...packed import parts
from ...packed.config import COLUMN_MULTIPLE, PackedConfig, Values, packed_config
from ...packed.format import DTYPES
from ...pattern import Pattern, parse_record
from ...progress import Meter
from ...pruning.config import PruneConfig
from ...store.checkpoint import CheckpointReader, read_config, same_bits
from ...store.files import write_json
from ...store.manifest import Manifest, TensorRecord
from ...store.pieces import Pieces
from ...store.readback import prove_written
from ...store.values import VALUES_NAME, read_values
from ...store.writing import CheckpointWriter, Planned
from ..frame import usage
from ..frame.exporter import Exporter, Source, Words, Written
from ..frame.foreign import counted
from ..frame.greedy import GREEDY_TOKENS, greedy_of

GUARD_SHAPE = (0,)


@dataclass(frozen=True)
class PackedPlan:
    """tensors: what will be written. packed, left: names of the pruned weights that are packed, and that are not.

    scales: of coded values, by the weight's name.
    """

    source: Source
    reader: CheckpointReader
    config: PackedConfig
    tensors: dict[str, Planned]
    packed: list[str]
    left: list[str]
    scales: Mapping[str, Tensor]


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
    coded: ClassVar[Words] = Words(
        "The weights are small whole numbers with scales, and pruned ones are not stored, in version 3 of the format "
        "`crepe-nm`: smaller on disk and in memory. transformers (after `import crepe_deploy`) runs it on CPUs and "
        "decodes each layer in every call, which is slower than dense; vLLM and GPUs do not run it. Readers without "
        "crepe-deploy refuse it. `crepe-deploy export --format dense` gives the plain folder back, bit by bit.",
        use=usage.CODED,
    )

    needs_manifest: ClassVar[bool] = False

    def foreign(self, folder: Path) -> Manifest:
        """Of a folder pruned elsewhere, the patterns that its layers hold."""
        return counted(folder)

    def check_pruning(self, model: Path, config: PruneConfig) -> None:
        step = config.steps.values
        grid = None if step is None else step.grid(torch.bfloat16)
        packed_config(config.pattern, values=None if grid is None else Values(grid.bits, grid.group))
        refuse_experts(model)

    def plan(self, source: Source, weights: Path) -> PackedPlan:
        values, scales = _values_of(weights)
        config = patterns_of(weights, source.manifest, values)
        decoder = Decoder(weights)
        packed, left = _choose(decoder.reader, source.manifest, config, scales)
        if not packed:
            raise ConfigError(
                f"{weights}: none of its {len(left)} pruned tensors can be packed in pattern {config.pattern}: that "
                f"needs (out, in) matrices whose columns are a multiple of {COLUMN_MULTIPLE} and of the group. Use "
                "--format dense"
            )
        _check_reads(decoder, packed)
        dense, spelled = dense_modules(decoder, packed), _spelled(decoder, config, packed)
        config = packed_config(config.pattern, dense, spelled, values)
        return PackedPlan(source, decoder.reader, config, _plan(decoder.reader, packed, config), packed, left, scales)

    def room(self, plan: PackedPlan) -> int:
        return sum(planned.size_bytes for planned in plan.tensors.values())

    def steps(self, plan: PackedPlan) -> int:
        return len(plan.reader.tensors) + len(plan.tensors) + GREEDY_TOKENS

    def write(self, plan: PackedPlan, folder: Path, tick: Meter, pieces: Pieces) -> Written:
        chosen = set(plan.packed)
        with CheckpointWriter(folder, plan.tensors, pieces=pieces) as writer:
            for info in writer.left(plan.reader, tick.before):
                tensor = plan.reader.load(info.name)
                if info.name in chosen:
                    _write_packed(writer, info.name, tensor, plan)
                    tensor = torch.empty(GUARD_SHAPE, dtype=info.dtype)
                writer.write(info.name, tensor)
                tick()
        return Written(fingerprints=writer.fingerprints)

    def companions(self, plan: PackedPlan, weights: Path, folder: Path) -> None:
        super().companions(plan, weights, folder)
        content = read_config(folder)
        write_json(folder / "config.json", {**content, "quantization_config": plan.config.to_dict()})

    def compare(self, plan: PackedPlan, written: Written, folder: Path, tick: Meter) -> Written:
        hashes = prove_written(folder, written.fingerprints, tick)
        greedy = greedy_of(plan.source.folder, plan.source.manifest, tick)
        return replace(written, hashes=hashes, metrics={"left_dense": plan.left, "greedy": greedy})

    def size(self, plan: PackedPlan, folder: Path) -> Mapping[str, Any]:
        written = CheckpointReader(folder)
        found = [written.info(name) for name in plan.tensors if name not in plan.reader]
        dense_bytes = sum(plan.reader.info(name).size_bytes for name in plan.packed)
        before, after = (sum(path.stat().st_size for path in reader.files) for reader in (plan.reader, written))
        return {
            "weight_bytes_over_dense": sum(part.size_bytes for part in found) / dense_bytes,
            "file_bytes_over_dense": after / before,
            "packed_tensors": len(plan.packed),
            "what": "bytes of the packed linear layers, and of all weight files, over the same stored dense",
            **({} if plan.config.values is None else {"values": str(plan.config.values)}),
        }

    def words_of(self, manifest: Manifest) -> Words:
        return self.coded if "values" in manifest.metrics["size"] else self.words


def _values_of(source: Path) -> tuple[Values | None, dict[str, Tensor]]:
    """How a folder's values are coded, None where they are not, and the scales of each weight. Raises CheckpointError,
    ConfigError for groups that cannot be packed."""
    found = read_values(source)
    values = {Values(grid.bits, grid.group) for grid, _ in found.values()}  # a file has one grid
    return (values.pop() if values else None), {name: scales for name, (_, scales) in found.items()}


def patterns_of(source: Path, manifest: Manifest, values: Values | None = None) -> PackedConfig:
    """The most common pattern of the pruned tensors, and the others by module. Raises ConfigError for none."""
    if not manifest.tensors:
        raise ConfigError(f"{source}: none of its tensors is pruned; there is nothing to pack")
    patterns = {name.removesuffix(".weight"): parse_record(record.pattern) for name, record in manifest.tensors.items()}
    common = Counter(patterns.values()).most_common(1)[0][0]
    for pattern in patterns.values():
        packed_config(pattern, values=values)
    others = {name: pattern for name, pattern in patterns.items() if pattern != common}
    return packed_config(common, (), others, values)


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


def _choose(
    reader: CheckpointReader, parent: Manifest, config: PackedConfig, scales: Mapping[str, Tensor]
) -> tuple[list[str], list[str]]:
    """The pruned tensors that are packed, and those that keep their zeros because the format cannot hold them."""
    packed: list[str] = []
    left: list[str] = []
    for name, record in parent.tensors.items():
        record.check_shape(name, reader.info(name).shape)
        fits = _packable(name, record, config) and reader.info(name).dtype in DTYPES
        fits = fits and (config.values is None or name in scales)
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
        plan[info.name] = Planned(info.file.name, info.dtype, GUARD_SHAPE)
        for suffix, part in parts.parts(of_tensor(config, info.name), info.dtype, *info.shape).items():
            plan[info.name + suffix] = Planned(info.file.name, part.dtype, part.shape)
    return plan


def _write_packed(writer: CheckpointWriter, name: str, weight: Tensor, plan: PackedPlan) -> None:
    """Write the parts of one weight. Raises ParityError unless they unpack to its bits, PatternError, CheckpointError
    where scales are another weight's."""
    config = of_tensor(plan.config, name)
    try:
        found = parts.stored(weight, plan.scales.get(name), config, name)
    except NumericalError as error:
        raise CheckpointError(
            f"{plan.reader.root}: '{name}': {error}: it was changed after {VALUES_NAME} was written. Without that file "
            "it is packed as it is; prune with --values makes a new one"
        ) from error
    if not same_bits(parts.dense(found, config, weight.shape[1]), weight):
        raise ParityError(f"{writer.root}: '{name}' unpacks to other bits than were packed")
    for suffix, tensor in found.items():
        writer.write(name + suffix, tensor)
