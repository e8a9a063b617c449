"""Export `int8`: every linear layer of the decoder blocks in 8 bits, weights and activations (W8A8).

The quantised peer to compare pruning with, about as many bytes as a packed checkpoint. Weights are rounded to nearest,
symmetric, one scale for each output channel; engines round activations as they come, one scale for each token. No
calibration, nothing learned: better quantisers exist. The folder is a compressed-tensors checkpoint ("int-quantized"),
which unmodified vLLM and, with the compressed-tensors package, transformers load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from ...errors import ConfigError, ParityError, UnsupportedModel, VerifyError
from ...model.decoder import Decoder
from ...progress import Meter
from ...pruning.config import PruneConfig
from ...store.checkpoint import CheckpointReader, TensorInfo, read_config
from ...store.files import write_json
from ...store.journal import numbers
from ...store.manifest import TensorRecord
from ...store.pieces import Pieces
from ...store.readback import prove_written
from ...store.writing import CheckpointWriter, Planned
from ..frame import usage
from ..frame.exporter import Exporter, Source, Words, Written
from .packed import dense_modules

SCALE_SUFFIX: Final = "_scale"
LARGEST: Final = 127
ROWS: Final = 1024
_HALF_STEP: Final = 0.5 + 2 * LARGEST * 2**-23  # float32 rounding of a quotient of up to 127, and of the product


@dataclass(frozen=True)
class Int8Plan:
    """tensors: what will be written. chosen: names of the weights that are quantised."""

    source: Source
    decoder: Decoder
    tensors: dict[str, Planned]
    chosen: list[str]

    @property
    def reader(self) -> CheckpointReader:
        return self.decoder.reader


@dataclass(frozen=True)
class Int8(Exporter[Int8Plan]):
    """A dense checkpoint, pruned or not, quantised; a folder without a manifest is taken as an unpruned model."""

    name: ClassVar[str] = "int8"
    needs_manifest: ClassVar[bool] = False
    stale: ClassVar[tuple[str, ...]] = ("left_dense", "greedy")  # the greedy prompt is another model's
    words: ClassVar[Words] = Words(
        truth="Weights and activations of the linear layers are rounded to 8 bits (W8A8: to nearest, one scale for "
        "each output channel, and for each token at run time; no calibration). Unmodified vLLM runs it with int8 "
        "kernels; transformers, with the compressed-tensors package, expands the weights at load and imitates the "
        "rounding of activations, so there it is no smaller and no faster. Zeros take a byte like every other value: "
        "pruning made this folder neither smaller nor faster.",
        tags=("int8",),
        done="quantised to int8",
        layers="quantised",
        use=usage.INT8,
    )

    def check_pruning(self, model: Path, config: PruneConfig) -> None:
        int8_tensors(Decoder(model))

    def check_source(self, source: Source) -> None:
        if source.manifest.format == "packed":
            raise ConfigError(
                f"{source.folder} is packed; --format int8 reads a dense checkpoint: first crepe-deploy export "
                f"{source.folder} --format dense"
            )
        super().check_source(source)

    def plan(self, source: Source, weights: Path) -> Int8Plan:
        decoder = Decoder(weights)
        chosen = int8_tensors(decoder)
        if strange := sorted(source.manifest.tensors.keys() - set(chosen)):
            raise VerifyError(f"manifest.json names the pruned tensor '{strange[0]}', which is no linear layer here")
        return Int8Plan(source, decoder, _plan(decoder.reader, set(chosen)), chosen)

    def room(self, plan: Int8Plan) -> int:
        return sum(planned.size_bytes for planned in plan.tensors.values())

    def steps(self, plan: Int8Plan) -> int:
        return len(plan.reader.tensors) + len(plan.tensors)

    def write(self, plan: Int8Plan, folder: Path, tick: Meter, pieces: Pieces) -> Written:
        chosen, parent = set(plan.chosen), plan.source.manifest

        def noted(name: str, note: Any) -> bool:
            return note is None if name not in chosen else _is_rounding(note, plan.reader.info(name))

        with CheckpointWriter(folder, plan.tensors, pieces=pieces, noted=noted) as writer:
            for info in writer.left(plan.reader, tick.before):
                tensor, note = plan.reader.load_finite(info.name), None
                if info.name in chosen:
                    weight = tensor
                    tensor, scales = quantize(weight)
                    error = rounding_error(f"{folder}: '{info.name}'", weight, tensor, scales)
                    note = [error, tensor.numel() - int(torch.count_nonzero(tensor))]
                    writer.write(info.name + SCALE_SUFFIX, scales)
                writer.write(info.name, tensor, note)
                tick()
        errors = {name: writer.notes[name][0] for name in plan.chosen}
        zeros = {name: writer.notes[name][1] for name in plan.chosen}
        shapes = {name: plan.reader.info(name).shape for name in parent.tensors}
        tensors = {name: old.recounted(name, zeros[name], shapes[name]) for name, old in parent.tensors.items()}
        metrics = {**_overall(tensors), "quantisation": _quantisation(errors)}
        return Written(fingerprints=writer.fingerprints, tensors=tensors, metrics=metrics)

    def companions(self, plan: Int8Plan, weights: Path, folder: Path) -> None:
        super().companions(plan, weights, folder)
        quantization = quantization_config(dense_modules(plan.decoder, plan.chosen))
        write_json(folder / "config.json", {**read_config(folder), "quantization_config": quantization})

    def compare(self, plan: Int8Plan, written: Written, folder: Path, tick: Meter) -> Written:
        return replace(written, hashes=prove_written(folder, written.fingerprints, tick))

    def size(self, plan: Int8Plan, folder: Path) -> Mapping[str, Any]:
        written = CheckpointReader(folder)
        parts = [written.info(name + suffix) for name in plan.chosen for suffix in ("", SCALE_SUFFIX)]
        dense_bytes = sum(plan.reader.info(name).size_bytes for name in plan.chosen)
        before, after = (sum(path.stat().st_size for path in reader.files) for reader in (plan.reader, written))
        return {
            "weight_bytes_over_dense": sum(part.size_bytes for part in parts) / dense_bytes,
            "file_bytes_over_dense": after / before,
            "quantised_tensors": len(plan.chosen),
            "what": "bytes of the quantised linear layers, and of all weight files, over the same stored dense; "
            "zeros take a byte like every other value",
        }


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


def rounding_error(name: str, weight: Tensor, values: Tensor, scales: Tensor) -> float:
    """||W - W'||_F / ||W||_F of a quantised weight (out, in) with its scales (out, 1).

    Raises ParityError where a value is further than half a scale from the weight's, or a zero is none any more.
    """
    change, size = 0.0, 0.0
    for rows, quantised, scale in zip(*(torch.split(part, ROWS) for part in (weight, values, scales)), strict=True):
        exact, step = rows.float(), scale.float()
        difference = exact - quantised.float() * step
        if bool((difference.abs() > step * _HALF_STEP).any()) or bool(quantised[rows == 0].any()):
            raise ParityError(f"{name} is not the source's weight rounded to nearest")
        change += float(difference.square().sum())
        size += float(exact.square().sum())
    return (change / size) ** 0.5 if size else 0.0


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


def _is_rounding(note: Any, info: TensorInfo) -> bool:
    """Whether it may be a weight's rounding error and its zeros."""
    if not numbers(note, 2):
        return False
    error, zeros = note
    return error >= 0 and isinstance(zeros, int) and 0 <= zeros <= math.prod(info.shape)


def _overall(tensors: Mapping[str, TensorRecord]) -> dict[str, float]:
    """The sparsity of the pruned tensors, recounted; nothing of an unpruned model."""
    size = sum(record.shape[0] * record.shape[1] for record in tensors.values())
    zeros = sum(record.zeros for record in tensors.values())
    return {"sparsity_of_pruned_tensors": zeros / size} if size else {}


def _quantisation(errors: Mapping[str, float]) -> dict[str, Any]:
    return {
        "weights": "int8, round to nearest, symmetric, one scale for each output channel",
        "activations": "int8, symmetric, one scale for each token, at run time",
        "mean_relative_error": sum(errors.values()) / len(errors),
        "relative_error": dict(errors),
        "what": "||W - W'||_F / ||W||_F of each quantised weight against its source",
    }
