"""Import of orphaned `sparse-24-bitmask` checkpoints, which current transformers and vLLM no longer load.

compressed-tensors 0.9 to 0.14 stored a 2:4 weight `P.weight` of shape (out, in) as three tensors:

    P.compressed  same dtype  (out, in/2)        kept values, row-major, ascending column
    P.bitmask     uint8       (out, ceil(in/8))  bit j%8 (least significant first) of byte j//8 set = column j kept
    P.shape       int64       (2, 1)             out, in

Such a folder has no manifest. It is unpacked, tensor by tensor, into a dense folder that has one, and that is exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ...errors import CheckpointError, ParityError, UnsupportedModel
from ...model.decoder import Decoder
from ...packed.format import DTYPES, unpack_mask
from ...pattern import NM
from ...store.audit import check_pattern
from ...store.checkpoint import CheckpointReader, read_config, same_bits
from ...store.companions import copy_companions
from ...store.files import require_disk, write_json
from ...store.manifest import MANIFEST_NAME, Manifest, TensorRecord, hash_folder, save_manifest, versions
from ...store.readback import ReadBack, check_fingerprint
from ...store.sources import Model, describe_source
from ...store.writing import CheckpointWriter, Planned
from ..frame.importer import Importer

QUANT_METHOD: Final = "compressed-tensors"
FORMAT: Final = "sparse-24-bitmask"
PATTERN: Final = NM(2, 4)
VALUES, BITMASK, SHAPE = PARTS = (".compressed", ".bitmask", ".shape")

_CONFIGS: Final = ("quantization_config", "compression_config")
_QUANTISED: Final = ("weight_scale", "weight_zero_point", "weight_packed", "weight_global_scale", "input_scale")
_NOTE: Final = "unpacked from compressed-tensors sparse-24-bitmask; pruned elsewhere, by a method that is not recorded"


class Bitmask24(Importer):
    """`sparse-24-bitmask` of compressed-tensors."""

    def recognises(self, source: Path) -> bool:
        """Whether the folder is none of ours (no manifest) and claims to be written by compressed-tensors."""
        if (source / MANIFEST_NAME).exists() or not (source / "config.json").is_file():
            return False
        quant, sparsity = _configs(read_config(source))
        return quant.get("quant_method") == QUANT_METHOD or sparsity.get("format") == FORMAT

    def convert(self, source: Path, folder: Path) -> Manifest:
        return import_bitmask24(source, folder)


def import_bitmask24(source: Path, folder: Path) -> Manifest:
    """Unpack a `sparse-24-bitmask` checkpoint into the existing, empty `folder`, with a manifest; compare every bit.

    Raises UnsupportedModel for real quantisation or another format, CheckpointError naming a tensor that is missing
    or inconsistent, ParityError.
    """
    content = read_config(source)
    _check_config(source, content)
    reader = CheckpointReader(source)
    shapes = _shapes(reader)
    plan: dict[str, Planned] = {}
    for info in reader:
        module, _, part = info.name.rpartition(".")
        if module not in shapes or f".{part}" not in PARTS:
            plan[info.name] = Planned(info.file.name, info.dtype, info.shape)
        elif f".{part}" == VALUES:
            plan[f"{module}.weight"] = Planned(info.file.name, info.dtype, shapes[module])
    require_disk(folder, sum(planned.size_bytes for planned in plan.values()))
    with CheckpointWriter(folder, plan, fingerprint=True) as writer:
        for name in plan:
            module = name.removesuffix(".weight")
            packed = module in shapes
            writer.write(name, _decoded(reader, module, shapes[module]) if packed else reader.load_finite(name))
    copy_companions(source, folder)
    config = {key: value for key, value in read_config(folder).items() if key not in _CONFIGS}
    write_json(folder / "config.json", config)
    manifest = _manifest(source, folder, shapes, writer.fingerprints)
    save_manifest(folder, manifest)
    return manifest


def _configs(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The quantization and sparsity configs of a config.json, empty where absent."""
    quant = next((config for key in _CONFIGS if isinstance(config := content.get(key), dict)), {})
    inner, outer = quant.get("sparsity_config"), content.get("sparsity_config")
    sparsity = inner if isinstance(inner, dict) and inner else outer
    return quant, sparsity if isinstance(sparsity, dict) else {}


def _check_config(source: Path, content: dict[str, Any]) -> None:
    quant, sparsity = _configs(content)
    groups = quant.get("config_groups") or {}
    schemes = groups.items() if isinstance(groups, dict) else [("config_groups", groups)]
    quantised = [name for name, scheme in schemes if not isinstance(scheme, dict) or _quantises(scheme)]
    quantised += (
        [f"quant_method {method}"] if (method := quant.get("quant_method", QUANT_METHOD)) != QUANT_METHOD else []
    )
    quantised += [key for key in ("kv_cache_scheme", "transform_config") if quant.get(key)]
    if quantised:
        raise UnsupportedModel(
            f"{source}: its config.json asks for quantisation or transforms ({', '.join(quantised)}); only unquantised "
            f"{FORMAT} weights are converted"
        )
    format, structure = sparsity.get("format"), str(sparsity.get("sparsity_structure") or PATTERN)
    if format != FORMAT or structure != str(PATTERN):
        raise UnsupportedModel(
            f"{source}: sparsity format '{format}', structure '{structure}'; of {QUANT_METHOD} checkpoints only "
            f"'{FORMAT}' with '{PATTERN}' is converted"
        )


def _quantises(scheme: dict[str, Any]) -> bool:
    return any(scheme.get(part) for part in ("weights", "input_activations", "output_activations"))


def _shapes(reader: CheckpointReader) -> dict[str, tuple[int, int]]:
    """The dense shape of every compressed weight by module, checked against the headers of its parts."""
    for name in reader.tensors:
        if name.endswith(_QUANTISED):
            raise UnsupportedModel(
                f"{reader.root}: tensor '{name}' belongs to a quantised weight; only bf16, fp16, fp32 are converted"
            )
    modules = {name.removesuffix(part) for part in PARTS for name in reader.tensors if name.endswith(part)}
    if not modules:
        raise CheckpointError(
            f"{reader.root}: config.json says {FORMAT} and no tensor is stored that way; its weights are dense "
            "already, and the quantization_config and sparsity_config in config.json can be removed"
        )
    return {module: _shape(reader, module) for module in sorted(modules)}


def _shape(reader: CheckpointReader, module: str) -> tuple[int, int]:
    values, bitmask, shape = (reader.info(module + part) for part in PARTS)
    if f"{module}.weight" in reader:
        raise CheckpointError(f"{reader.root}: '{module}.weight' is stored both dense and compressed")
    if values.dtype not in DTYPES:
        raise UnsupportedModel(f"{reader.root}: '{values.name}' is {values.dtype}; only bf16, fp16, fp32 are converted")
    stored = reader.load(shape.name).flatten().tolist() if shape.shape in {(2,), (2, 1)} else []
    if shape.dtype not in (torch.int64, torch.int32) or len(stored) != 2 or min(stored) < 1 or stored[1] % 4:
        raise CheckpointError(
            f"{reader.root}: '{shape.name}' holds {stored or list(shape.shape)}, not out and in (a multiple of 4)"
        )
    rows, columns = int(stored[0]), int(stored[1])
    if bitmask.dtype != torch.uint8:
        raise CheckpointError(f"{reader.root}: '{bitmask.name}' is {bitmask.dtype}, not uint8")
    for info, expected in ((values, (rows, columns // 2)), (bitmask, (rows, -(-columns // 8)))):
        if info.shape != expected:
            raise CheckpointError(f"{reader.root}: '{info.name}' has shape {info.shape}, expected {expected}")
    return rows, columns


def _load(reader: CheckpointReader, module: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Values (out, in/2) and bool mask (out, in) of one weight. Raises CheckpointError unless 2 of every 4 are kept."""
    values, bits = reader.load_finite(module + VALUES), unpack_mask(reader.load(module + BITMASK))
    rows, columns = shape
    if bool(bits[:, columns:].any()):
        raise CheckpointError(f"{reader.root}: '{module}{BITMASK}' has bits beyond its {columns} columns")
    mask = bits[:, :columns].contiguous()
    wrong = mask.view(rows, -1, PATTERN.m).sum(-1, dtype=torch.int8) != PATTERN.n
    if bool(wrong.any()):
        row, group = divmod(int(wrong.flatten().int().argmax()), wrong.shape[1])
        start = group * PATTERN.m
        raise CheckpointError(
            f"{reader.root}: '{module}{BITMASK}': row {row}, columns {start} to {start + PATTERN.m - 1} do not keep "
            f"exactly {PATTERN.n} of {PATTERN.m}"
        )
    return values, mask


def _decoded(reader: CheckpointReader, module: str, shape: tuple[int, int]) -> Tensor:
    """The dense weight: the kept bits are the stored ones, all others +0.0. Raises CheckpointError, ParityError."""
    values, mask = _load(reader, module, shape)
    weight = torch.zeros(mask.shape, dtype=values.dtype)
    weight[mask] = values.flatten()
    rest = weight[~mask]
    if not same_bits(weight[mask].view(values.shape), values) or not same_bits(rest, torch.zeros_like(rest)):
        raise ParityError(f"'{module}.weight' unpacks to other bits than {reader.root} holds")
    return weight


def _manifest(
    source: Path, folder: Path, shapes: dict[str, tuple[int, int]], fingerprints: Mapping[str, str]
) -> Manifest:
    """What is known: counts, hashes and origin. Method, calibration and layer errors are not, and stay empty."""
    decoder = Decoder(folder)
    blocks = {spec.key for specs in decoder.linears for spec in specs if not spec.transposed}
    records: dict[str, TensorRecord] = {}
    files = ReadBack(folder)
    for info, weight in files:
        check_fingerprint(folder, info.name, weight, fingerprints)
        if info.name in blocks and info.name.removesuffix(".weight") in shapes:
            records[info.name] = _record(info.name, weight)
    if not records:
        raise UnsupportedModel(f"{source}: none of its {FORMAT} weights is a linear layer of a decoder block")
    others = sorted(f"{module}.weight" for module in shapes if f"{module}.weight" not in records)
    notes = {"weights": _NOTE} | ({"kept dense with zeros": ", ".join(others)} if others else {})
    size = sum(record.shape[0] * record.shape[1] for record in records.values())
    return Manifest(
        stage="import",
        format="dense",
        versions=versions(),
        source=describe_source(Model(source, "folder", str(source), None, notes)),
        config={"method": None, "resolved_method": {}, "pattern": str(PATTERN), "imported_from": FORMAT},
        tensors=records,
        dense_tensors=sorted(set(decoder.reader.tensors) - set(records)),
        metrics={
            "sparsity_of_pruned_tensors": sum(record.zeros for record in records.values()) / size,
            "pruned_tensors": len(records),
            "mean_layer_error": None,
        },
        files=hash_folder(folder, files.hashes),
    )


def _record(name: str, weight: Tensor) -> TensorRecord:
    zeros = check_pattern(name, weight, PATTERN)
    return TensorRecord(
        shape=(weight.shape[0], weight.shape[1]),
        pattern=str(PATTERN),
        zeros=zeros,
        sparsity=zeros / weight.numel(),
        layer_error=None,
        layer_error_weighting="unknown",
    )
