"""The pruning pipeline: plan, allocate, prune block by block while writing, prove what was written, and record it.

Every read of the weights, and why it is one of its own (a test counts them):

source  files       sha256, in the order of the bytes, not of the blocks; a stopped run is known by it
        embeddings  in front of the first block, for all token sets at once
        blocks      once more before, where an allocation looks at the dense model first
        blocks      one at a time: pruned, written, and sent the hidden states through
        the rest    behind the last block: rescaled, run for the logits, and written from the same memory
output  walk        embeddings, blocks, head, from the disk: logits against memory, and zeros counted on the way
        files       sha256
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crepe_deploy.device import CPU, described
from crepe_deploy.errors import NumericalError, VerifyError
from crepe_deploy.model.decoder import Head
from crepe_deploy.model.proof import check_parity
from crepe_deploy.pattern import Pattern, parse_record
from crepe_deploy.phases import Phases
from crepe_deploy.progress import Progress, part, silent
from crepe_deploy.store.audit import check_pattern
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.companions import copy_companions
from crepe_deploy.store.files import clear
from crepe_deploy.store.journal import Journal
from crepe_deploy.store.manifest import Manifest, Source, TensorRecord, hash_folder, inherit, save_manifest, versions
from crepe_deploy.store.sources import Model, describe_source
from crepe_deploy.store.values import (
    VALUES_NAME,
    planned_scales,
    read_values,
    require_on_grid,
    scales_name,
    values_metadata,
)
from crepe_deploy.store.work import unfinished
from crepe_deploy.store.writing import CheckpointWriter, Planned
from crepe_deploy.texts import CalibrationSet

from .block import Streams, prune_block, start_streams
from .config import PruneConfig
from .layer import LayerResult
from .metering import RunMeter
from .records import by_tensor, of_experts, records_of
from .replay import are_patterns, note, replayed
from .run_plan import RunPlan, plan_run
from .steps.allocate import allocate, summary
from .steps.repair import Repaired
from .steps.rescale import Rescaled, rescale_head


@dataclass(frozen=True)
class Pruned:
    """What was done while writing: to each layer by tensor name, to each block where blocks are repaired, the logits
    on the probe, the rescaling, seconds."""

    layers: dict[str, LayerResult]
    repaired: list[Repaired]
    logits: Tensor
    rescaled: Rescaled | None
    seconds: dict[str, float]


Seal = Callable[[Path, Manifest], Manifest]  # what the core cannot do: a model card beside the manifest


def saved(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest, saved in `folder`."""
    save_manifest(folder, manifest)
    return manifest


def prune(
    model: Model,
    out: Path,
    config: PruneConfig,
    calibration: CalibrationSet | None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    step: Progress = silent,
    device: torch.device = CPU,
    seal: Seal = saved,
) -> Manifest:
    """Prune `model` into the checkpoint folder `out`, which appears whole and verified or not at all.

    calibration: needed by methods with statistics. step: told of weights read and pruned, many times in each block.
    resume: go on with what a stopped run left in OUT.work: at most one block is pruned again. device: that computes;
    weights come to it block by block, and go back to be written. seal: saves the manifest.
    Returns the manifest that was written. Raises InputError before any work that could be spared,
    NumericalError, DiskFullError, VerifyError, ParityError.
    """
    plan = plan_run(model, out, config, calibration, overwrite=overwrite, device=device)
    origin = describe_origin(model, plan, calibration)
    with unfinished(out, origin.identity(), resume=resume, overwrite=overwrite) as run:
        return prune_into(run.folder, run.journal, plan, origin, step, seal)


@dataclass(frozen=True)
class Origin:
    """Where a pruned checkpoint comes from: the model as it lies there, hashed, the options, the text, the device."""

    folder: Path
    source: Source
    config: dict[str, Any]
    calibration: dict[str, Any] | None
    device: str

    def identity(self) -> dict[str, Any]:
        """What must be equal for a stopped run to go on with the same bytes."""
        return {
            "what": "pruning", "source": self.source.model_dump(mode="json"), "config": self.config,
            "calibration": self.calibration, "device": self.device,
        }  # fmt: skip


def describe_origin(model: Model, plan: RunPlan, calibration: CalibrationSet | None) -> Origin:
    """Read every file of the model once."""
    read = calibration.record() if calibration is not None and plan.config.needs_text else None
    return Origin(model.folder, describe_source(model), plan.config.record(), read, plan.decoder.device.type)


def prune_into(
    folder: Path, journal: Journal, plan: RunPlan, origin: Origin, step: Progress, seal: Seal = saved
) -> Manifest:  # fmt: skip
    """Prune into `folder`, going on with what it and `journal` hold of this run; returns the manifest that was saved.

    Raises as `prune` does.
    """
    config, phases = plan.config, Phases()
    meter = RunMeter(plan, part(step, f"pruning to {config.pattern}, {config.title}"))
    with phases("embed"):
        streams = start_streams(plan)
    if config.steps.allocate is not None:
        with phases("allocate"):
            plan = replace(plan, patterns=_allocated(plan, streams, journal, meter))
    pruned = _write(folder, journal, plan, streams, meter)
    phases.add(pruned.seconds)
    copy_companions(origin.folder, folder)
    with phases("verify"):
        zeros, parity = _prove(folder, plan, pruned)
    with phases("hash"):
        parent = inherit(origin.folder, folder, origin.source.files)
        files = hash_folder(folder)
    tensors = records_of(plan, pruned.layers, zeros)
    manifest = Manifest(
        stage="prune",
        format="dense",
        versions=versions(),
        source=origin.source,
        config=origin.config,
        calibration=origin.calibration,
        tensors=tensors,
        dense_tensors=sorted(set(plan.decoder.reader.tensors) - set(tensors)),
        metrics=_metrics(plan, tensors, pruned, phases.seconds, parity),
        files=files,
        parent=parent,
    )
    return seal(folder, manifest)


def _allocated(plan: RunPlan, streams: Streams, journal: Journal, meter: RunMeter) -> dict[str, Pattern]:
    """Every tensor's own pattern."""
    assert plan.config.steps.allocate is not None
    names = {spec.key for block in plan.targets for spec in block}
    known = journal.get("allocation", "patterns", partial(are_patterns, names=names))
    if known is not None:
        meter.allocated()
        return {name: parse_record(text) for name, text in known.items()}
    stream = (streams.calibration or streams.probe).twin()
    step = meter.allocation()
    found = allocate(plan.decoder, plan.targets, stream, plan.config.steps.allocate, plan.config.pattern, step)
    journal.add("allocation", "patterns", {name: str(pattern) for name, pattern in found.items()})
    return found


def _write(folder: Path, journal: Journal, plan: RunPlan, streams: Streams, meter: RunMeter) -> Pruned:
    """Write the pruned checkpoint's tensors into `folder`, and into the journal what was done to each block."""
    decoder, phases = plan.decoder, Phases()
    layers: dict[str, LayerResult] = {}
    repaired: list[Repaired] = []
    layout = _same_layout(decoder.reader) | _scales_layout(plan)
    clear(folder, {planned.file for planned in layout.values()})  # what a stopped run has put beside the weights goes
    with CheckpointWriter(folder, layout, fingerprint=True, resume=True, beside=_beside(plan)) as writer:
        for index in range(len(decoder.blocks)):
            with decoder.block(index) as (_, weights):
                result = replayed(plan, index, streams, weights, journal, writer)
                done = meter.block if result is None else meter.kept
                if result is None:
                    result = prune_block(plan, index, streams, weights, meter)
                    with phases("write"):
                        for name, tensor in weights.items():
                            writer.write(name, tensor.cpu())
                        note(journal, index, result, {name: writer.fingerprints[name] for name in weights})
            layers |= result.layers
            repaired += [] if result.repaired is None else [result.repaired]
            phases.add(result.seconds)
            done(index)
        with decoder.head() as head:
            with phases("rescale"):
                rescaled = _rescale(plan, streams, head)
            with phases("verify"):
                logits = head(plan.probe, streams.probe.hidden[0]).float().cpu()
            if not logits.isfinite().all():
                raise NumericalError(
                    "the pruned model's logits are not finite on the calibration text: activations overflow the dtype "
                    "of computation; compute with --dtype float32"
                )
            with phases("write"):
                for name in writer.pending:
                    writer.write(name, head.weights[name].cpu() if name in head.weights else decoder.reader.load(name))
    return Pruned(layers, repaired, logits, rescaled, phases.seconds)


def _same_layout(reader: CheckpointReader) -> dict[str, Planned]:
    """The source's own tensors, dtypes and shard names."""
    return {info.name: Planned(info.file.name, info.dtype, info.shape) for info in reader}


def _scales_layout(plan: RunPlan) -> dict[str, Planned]:
    """The scales of all targets, where values are quantised."""
    values, planned = plan.config.steps.values, {}
    if values is not None:
        for spec in (spec for block in plan.targets for spec in block):
            grid = values.grid(plan.decoder.reader.info(spec.key).dtype)
            planned[scales_name(spec.key)] = planned_scales(grid, spec.out_features, spec.in_features)
    return planned


def _beside(plan: RunPlan) -> dict[str, dict[str, str]]:
    """The file of scales, where there is one, and what it says of its grid."""
    if plan.config.steps.values is None:
        return {}
    grid = plan.config.steps.values.grid(plan.decoder.dtype)
    return {VALUES_NAME: values_metadata(grid.bits, grid.group)}


def _rescale(plan: RunPlan, streams: Streams, head: Head) -> Rescaled | None:
    """Fit the scale of the logits, where that was asked for, and scale the last norm of `head` by it."""
    rescale = plan.config.steps.rescale
    if rescale is None or plan.held is None:
        return None
    dense, pruned = (torch.cat(side.stream.hidden) for side in (streams.pairs[1].dense, streams.pairs[1].pruned))
    rescaled = rescale.fit(plan.decoder, head, plan.held, dense, pruned)
    rescale_head(plan.decoder, head, rescaled.factor)
    return rescaled


def _prove(folder: Path, plan: RunPlan, pruned: Pruned) -> tuple[dict[str, int], dict[str, Any]]:
    """Zeros of every target by tensor name, and the parity of the logits, as a fresh reader finds both on the disk."""
    specs, zeros = by_tensor(plan), dict[str, int]()
    values = read_values(folder)

    def count(weights: dict[str, Tensor]) -> None:
        for key, spec in ((spec.key, spec) for name in weights.keys() & specs.keys() for spec in specs[name]):
            weight = spec.of(weights).contiguous()
            zeros[key] = check_pattern(key, weight, plan.patterns[key])
            if zeros[key] != pruned.layers[key].zeros:
                raise VerifyError(f"{key}: {zeros[key]} zeros were written of {pruned.layers[key].zeros}")
            if key in values:
                require_on_grid(key, weight, *values[key])

    parity = check_parity(folder, plan.config.dtype, plan.probe, pruned.logits, count, plan.decoder.device)
    return zeros, parity


def _metrics(
    plan: RunPlan,
    records: Mapping[str, TensorRecord],
    pruned: Pruned,
    seconds: Mapping[str, float],
    parity: dict[str, Any],
) -> dict[str, Any]:
    size = sum(math.prod(record.shape) for record in records.values())
    experts, said = of_experts(plan, pruned.layers)
    return {
        "sparsity_of_pruned_tensors": sum(record.zeros for record in records.values()) / size,
        "patterns": summary(dict(plan.patterns)),
        "pruned_tensors": len(records),
        "mean_layer_error": sum(record.layer_error or 0.0 for record in records.values()) / len(records),
        **({"repair": [asdict(block) for block in pruned.repaired]} if pruned.repaired else {}),
        **({} if pruned.rescaled is None else {"rescale": asdict(pruned.rescaled)}),
        **experts,
        **({"limits": plan.limits + said} if plan.limits + said else {}),
        "device": described(plan.decoder.device),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "parity": parity,
    }
