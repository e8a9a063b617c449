"""Export `int8`: every linear layer of the decoder blocks in 8 bits, weights and activations (W8A8).

The quantised peer to compare pruning with, about as many bytes as a packed checkpoint. Weights are rounded to nearest,
symmetric, one scale for each output channel; engines round activations as they come, one scale for each token. No
calibration, nothing learned: better quantisers exist. The folder is a compressed-tensors checkpoint ("int-quantized"),
which unmodified vLLM and, with the compressed-tensors package, transformers load.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import ConfigError, ParityError, UnsupportedModel
from ..model.decoder import Decoder
from ..progress import Progress, silent, ticker
from ..store.checkpoint import CheckpointReader, read_json
from ..store.companions import copy_companions
from ..store.files import require_disk, write_json
from ..store.manifest import (
    MANIFEST_NAME,
    Manifest,
    TensorRecord,
    hash_folder,
    save_manifest,
    sha256_file,
    verify,
    versions,
)
from ..store.sources import Model, describe_source
from ..store.writing import CheckpointWriter, Planned
from .card import write_card
from .packed import dense_modules

SCALE_SUFFIX: Final = "_scale"
LARGEST: Final = 127
ROWS: Final = 1024
_HALF_STEP: Final = 0.5 * (1 + 1e-5)  # float32 rounding of the quotient included


def export_int8(source: Path, folder: Path, *, link: bool = False, step: Progress = silent) -> Manifest:
    """Quantise a dense checkpoint, pruned or not, into the existing, empty `folder`; re-read and compare every weight.

    A source without a manifest is taken as an unpruned model. link: nothing to do here. step: told of every piece of
    work done. Raises VerifyError when the source differs from its manifest, ConfigError for a packed or int8 source,
    UnsupportedModel, CheckpointError, ParityError.
    """
    parent = _parent(source)
    decoder = Decoder(source)
    chosen = int8_tensors(decoder)
    reader = decoder.reader
    plan = _plan(reader, set(chosen))
    require_disk(folder, sum(planned.size_bytes for planned in plan.values()))
    tick = ticker(step, len(list(reader)) + len(chosen))
    _write(reader, folder, plan, set(chosen), tick)
    copy_companions(source, folder)
    quantization = quantization_config(dense_modules(decoder, chosen))
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "quantization_config": quantization})
    zeros, errors = _compare(reader, folder, chosen, tick)
    tensors = {name: _recounted(record, zeros[name]) for name, record in parent.tensors.items()}
    metrics = {**_kept(parent, tensors), **_metrics(reader, folder, errors)}
    update: dict[str, Any] = {"stage": "export", "format": "int8", "tensors": tensors, "metrics": metrics}
    if (source / MANIFEST_NAME).exists():
        update["parent"] = sha256_file(source / MANIFEST_NAME)
    manifest = parent.model_copy(update=update)
    write_card(folder, manifest)
    manifest = manifest.model_copy(update={"files": hash_folder(folder)})
    save_manifest(folder, manifest)
    return manifest


def int8_tensors(decoder: Decoder) -> list[str]:
    """The weights that are quantised: all linear layers of the blocks. Raises UnsupportedModel naming a misfit."""
    specs = [spec for block in decoder.linears for spec in block]
    for spec in specs:
        if spec.transposed or not spec.key.endswith(".weight"):
            raise UnsupportedModel(
                f"model type '{decoder.config.model_type}' stores '{spec.key}' as (in, out), which compressed-tensors "
                "cannot quantise; --format int8 needs nn.Linear layers"
            )
    return [spec.key for spec in specs]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weight (out, in) to nearest: int8 values (out, in) and scales (out, 1) in the weight's dtype.

    The largest magnitude of a row becomes 127; zeros stay zero. Scales below the dtype's smallest normal number are
    raised to it. |weight - values * scales| is at most half a scale.
    """
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty((weight.shape[0], 1), dtype=weight.dtype)
    smallest = torch.finfo(weight.dtype).tiny
    parts = (torch.split(tensor, ROWS) for tensor in (weight, values, scales))
    for rows, quantised, scale in zip(*parts, strict=True):
        exact = rows.float()
        scale.copy_((exact.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_(min=smallest))
        quantised.copy_((exact / scale.float()).round_().clamp_(-LARGEST, LARGEST))
    return values, scales


def quantization_config(ignore: list[str]) -> dict[str, Any]:
    """compressed-tensors' description of the scheme, as `config.json` holds it; `ignore`: modules left alone."""
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
        "output_activations": None,
        "format": "int-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _parent(source: Path) -> Manifest:
    """The source's verified manifest, or what is known of a plain model folder."""
    if not (source / MANIFEST_NAME).exists():
        return Manifest(
            stage="source",
            format="dense",
            versions=versions(),
            source=describe_source(Model(source, "folder", str(source), None, {})),
            config={"method": None, "resolved_method": {}, "pattern": None},
        )
    parent = verify(source)
    if parent.format == "packed":
        raise ConfigError(
            f"{source} is packed; --format int8 reads a dense checkpoint: first crepe-deploy export {source} "
            "--format dense"
        )
    if parent.format != "dense":
        raise ConfigError(f"{source} is already {parent.format}; --format int8 reads the dense checkpoint it came from")
    return parent


def _plan(reader: CheckpointReader, chosen: set[str]) -> dict[str, Planned]:
    """What is written, from headers alone: the source's shards and order, each scale after its weight."""
    plan: dict[str, Planned] = {}
    for info in reader:
        if info.name not in chosen:
            plan[info.name] = Planned(info.file.name, info.dtype, info.shape)
            continue
        plan[info.name] = Planned(info.file.name, torch.int8, info.shape)
        plan[info.name + SCALE_SUFFIX] = Planned(info.file.name, info.dtype, (info.shape[0], 1))
    return plan


def _write(
    reader: CheckpointReader, folder: Path, plan: dict[str, Planned], chosen: set[str], tick: Callable[[], None]
) -> None:
    with CheckpointWriter(folder, plan) as writer:
        for info in reader:
            tensor = reader.load_finite(info.name)
            if info.name in chosen:
                tensor, scales = quantize(tensor)
                writer.write(info.name + SCALE_SUFFIX, scales)
            writer.write(info.name, tensor)
            tick()


def _compare(
    reader: CheckpointReader, folder: Path, chosen: list[str], tick: Callable[[], None]
) -> tuple[dict[str, int], dict[str, float]]:
    """Re-read every quantised weight: zeros counted, and ||W - W'||_F / ||W||_F, by name. Raises ParityError where a
    value is further than half a scale from the source's, or a zero is none any more."""
    written = CheckpointReader(folder)
    zeros: dict[str, int] = {}
    errors: dict[str, float] = {}
    for name in chosen:
        weight, values, scales = reader.load(name), written.load(name), written.load(name + SCALE_SUFFIX)
        change, size = 0.0, 0.0
        for rows, quantised, scale in zip(*(torch.split(t, ROWS) for t in (weight, values, scales)), strict=True):
            exact, step = rows.float(), scale.float()
            difference = exact - quantised.float() * step
            if bool((difference.abs() > step * _HALF_STEP).any()) or bool(quantised[rows == 0].any()):
                raise ParityError(f"{folder}: '{name}' is not {reader.root}'s weight rounded to nearest")
            change += float(difference.square().sum())
            size += float(exact.square().sum())
        zeros[name] = values.numel() - int(torch.count_nonzero(values))
        errors[name] = (change / size) ** 0.5 if size else 0.0
        tick()
    return zeros, errors


def _recounted(record: TensorRecord, zeros: int) -> TensorRecord:
    """The pruned tensor's record with its zeros as stored: rounding adds some."""
    return record.model_copy(update={"zeros": zeros, "sparsity": zeros / (record.shape[0] * record.shape[1])})


def _kept(parent: Manifest, tensors: dict[str, TensorRecord]) -> dict[str, Any]:
    """The pruned source's metrics that still hold, its zeros recounted; its greedy prompt is another model's."""
    kept = {name: value for name, value in parent.metrics.items() if name not in ("left_dense", "greedy")}
    if tensors:
        size = sum(record.shape[0] * record.shape[1] for record in tensors.values())
        kept["sparsity_of_pruned_tensors"] = sum(record.zeros for record in tensors.values()) / size
    return kept


def _metrics(reader: CheckpointReader, folder: Path, errors: dict[str, float]) -> dict[str, Any]:
    written = CheckpointReader(folder)
    parts = [written.info(name + suffix) for name in errors for suffix in ("", SCALE_SUFFIX)]
    dense_bytes = sum(reader.info(name).size_bytes for name in errors)
    before, after = (sum(path.stat().st_size for path in found.files) for found in (reader, written))
    return {
        "size": {
            "weight_bytes_over_dense": sum(part.size_bytes for part in parts) / dense_bytes,
            "file_bytes_over_dense": after / before,
            "quantised_tensors": len(errors),
            "what": "bytes of the quantised linear layers, and of all weight files, over the same stored dense; "
            "zeros take a byte like every other value",
        },
        "quantisation": {
            "weights": "int8, round to nearest, symmetric, one scale for each output channel",
            "activations": "int8, symmetric, one scale for each token, at run time",
            "mean_relative_error": sum(errors.values()) / len(errors),
            "relative_error": errors,
            "what": "||W - W'||_F / ||W||_F of each quantised weight against its source",
        },
    }
