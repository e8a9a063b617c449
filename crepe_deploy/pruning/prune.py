"""The pruning pipeline: block by block, materialise, calibrate, score, select, write, and prove what was written."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.calibrate import Collector, Stream, embed
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.model.paired import Pair
from crepe_deploy.model.proof import check_parity
from crepe_deploy.model.stats import Stats
from crepe_deploy.progress import Progress, silent
from crepe_deploy.store.audit import check_pattern
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.companions import copy_companions
from crepe_deploy.store.files import require_disk
from crepe_deploy.store.folders import atomic_folder, check_output
from crepe_deploy.store.manifest import Manifest, hash_folder, save_manifest, versions
from crepe_deploy.store.sources import Model, describe_source
from crepe_deploy.store.writing import CheckpointWriter, Planned
from crepe_deploy.texts import CalibrationSet

from .block import BlockPruner, Treatment
from .config import PruneConfig
from .limits import limits
from .steps.allocate import allocate, summary, uniform
from .steps.rescale import Rescaled, rescaled_tensors
from .targets import choose_targets

PROBE_TOKENS = 64


@dataclass
class _Run:
    """One run's parts, so that the steps below take few arguments.

    held: calibration tokens (windows, length) kept from everything but rescaling. rescaled: what that found.
    limits: what the family allows only in part.
    """

    decoder: Decoder
    config: PruneConfig
    targets: list[list[LinearSpec]]
    pruner: BlockPruner
    held: Tensor | None = None
    rescaled: Rescaled | None = None
    limits: list[str] = field(default_factory=list)


def prune(
    model: Model,
    out: Path,
    config: PruneConfig,
    calibration: CalibrationSet | None,
    *,
    overwrite: bool = False,
    step: Progress = silent,
) -> Manifest:
    """Prune `model` into the checkpoint folder `out`, which appears whole and verified or not at all.

    calibration: needed by methods with statistics. step: called after each block.
    Returns the manifest that was written. Raises InputError before any work that could be spared,
    NumericalError, DiskFullError, VerifyError, ParityError.
    """
    run, calibration_tokens = _prepare(model, out, config, calibration, overwrite)
    with atomic_folder(out, overwrite=overwrite) as folder:
        probe = _probe_tokens(run.decoder, calibration_tokens)
        if run.pruner.treatment.steps.allocate is not None:
            step = _allocate(run, probe if calibration_tokens is None else calibration_tokens, step)
        logits = _prune_into(folder, run, calibration_tokens, probe, step)
        copy_companions(model.folder, folder)
        with run.pruner.phases("verify"):
            _recount(folder, run)
            parity = check_parity(folder, config.dtype, probe, logits)
        manifest = _manifest(folder, model, run, calibration, parity)
        save_manifest(folder, manifest)
    return manifest


def _prepare(
    model: Model, out: Path, config: PruneConfig, calibration: CalibrationSet | None, overwrite: bool
) -> tuple[_Run, Tensor | None]:
    """Everything that can be refused is refused here, before any weight is read."""
    check_output(out, overwrite=overwrite, inputs=(model.folder,))
    decoder = Decoder(model.folder, config.dtype)
    targets = choose_targets(decoder, config.pattern, config.include, config.exclude)
    wanted = config.needs_text
    if wanted and calibration is None:
        raise ConfigError(f"method '{config.origin.method}' needs calibration text: give --calib FILE_OR_DATASET")
    require_disk(out, sum(info.size_bytes for info in decoder.reader))
    tokens = calibration.tokens if calibration is not None and wanted else None
    if tokens is not None and tokens.shape[1] > decoder.context_length:
        raise ConfigError(
            f"calibration windows of {tokens.shape[1]} tokens exceed the model's context of {decoder.context_length}"
        )
    treatment = Treatment(config.method, config.steps, uniform(targets, config.pattern))
    run = _Run(decoder, config, targets, BlockPruner(decoder, treatment))
    run.limits = limits(decoder, targets, config.steps, config.feed)
    if config.steps.rescale is not None and tokens is not None:
        fitted = len(tokens) - config.steps.rescale.held_out(len(tokens))
        tokens, run.held = tokens[:fitted], tokens[fitted:]
    return run, tokens


def _probe_tokens(decoder: Decoder, tokens: Tensor | None) -> Tensor:
    """Tokens (1, <=64) carried through the pruned blocks to compare logits before and after writing."""
    if tokens is not None:
        return tokens[:1, :PROBE_TOKENS]
    length = min(PROBE_TOKENS, decoder.context_length)
    return torch.randint(decoder.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _allocate(run: _Run, tokens: Tensor, step: Progress) -> Progress:
    """Give every tensor its own pattern; returns the progress that the blocks go on with."""
    blocks, treatment = len(run.targets), run.pruner.treatment
    assert treatment.steps.allocate is not None
    with run.pruner.phases("allocate"):
        patterns = allocate(
            run.decoder, run.targets, tokens, treatment.steps.allocate, run.config.pattern,
            lambda done, _: step(done, 2 * blocks),
        )  # fmt: skip
    run.pruner.treatment = replace(treatment, patterns=patterns)
    return lambda done, _: step(blocks + done, 2 * blocks)


def _prune_into(folder: Path, run: _Run, tokens: Tensor | None, probe_tokens: Tensor, step: Progress) -> Tensor:
    """Write the pruned checkpoint's tensors into `folder`; returns the pruned model's logits on the probe."""
    decoder = run.decoder
    with CheckpointWriter(folder, _same_plan(decoder.reader)) as writer:
        with run.pruner.phases("embed"):
            probe, *streams = embed(decoder, [each for each in (probe_tokens, tokens, run.held) if each is not None])
        stream = streams[0] if streams else None
        pairs = [Pair.start(each, decoder.config) for each in streams] if run.config.feed == "both" else []
        written: set[str] = set()
        for index in range(len(decoder.blocks)):
            with decoder.block(index) as (_, weights):
                if pairs:
                    _prune_paired(run, index, pairs, weights)
                else:
                    _prune_block(run, index, stream, weights)
                with run.pruner.phases("forward"):
                    probe.run(decoder.blocks[index], index, advance=True)
                with run.pruner.phases("write"):
                    for name, tensor in weights.items():
                        writer.write(name, tensor)
                        written.add(name)
            step(index + 1, len(decoder.blocks))
        with run.pruner.phases("rescale"):
            _rescale(run, pairs)
        with run.pruner.phases("write"):
            for info in decoder.reader:
                if info.name not in written:
                    replaced = decoder.replaced.get(info.name)
                    writer.write(info.name, decoder.reader.load(info.name) if replaced is None else replaced)
    with run.pruner.phases("verify"):
        return decoder.logits(probe_tokens, probe.hidden[0])


def _prune_paired(run: _Run, index: int, pairs: list[Pair], weights: dict[str, Tensor]) -> None:
    """Prune the targets of the block group by group, each behind what is pruned already, and feed the next block.

    pairs: the calibration windows, and behind them the held-out ones where there are any.
    """
    block, targets, pruner = run.decoder.blocks[index], run.targets[index], run.pruner
    before = copy.deepcopy(block)
    for group in pairs[0].groups(block, index, run.decoder.linears[index], targets):
        with pruner.phases("forward"):
            stats = pairs[0].stats(before, block, index, group)
        for spec in group:
            pruner.prune(block, spec, weights, stats)
    with pruner.phases("forward"):
        for pair in pairs[1:] if index == len(run.targets) - 1 else pairs:
            pair.advance(before, block, index)


def _rescale(run: _Run, pairs: list[Pair]) -> None:
    """Fit the scale of the logits, where that was asked for; from here on the last norm is the rescaled one."""
    rescale = run.pruner.treatment.steps.rescale
    if rescale is None or run.held is None:
        return
    dense, pruned = (torch.cat(side.stream.hidden) for side in (pairs[1].dense, pairs[1].pruned))
    run.rescaled = rescale.fit(run.decoder, run.held, dense, pruned)
    run.decoder.replaced |= rescaled_tensors(run.decoder, run.rescaled.factor)


def _prune_block(run: _Run, index: int, stream: Stream | None, weights: dict[str, Tensor]) -> None:
    """Collect statistics, prune every target of the block in place, and feed the next block."""
    block, targets = run.decoder.blocks[index], run.targets[index]
    last = index == len(run.targets) - 1
    collector = Collector(run.pruner.treatment.needs)
    if stream is not None:
        with run.pruner.phases("forward"), collector.watching(block, targets):
            stream.run(block, index, advance=run.config.feed == "dense")
    for spec in targets:
        run.pruner.prune(
            block, spec, weights, Stats() if stream is None else collector.stats(spec.path, stream.sequences)
        )
    if stream is not None and run.config.feed == "pruned" and not last:
        with run.pruner.phases("forward"):
            stream.run(block, index, advance=True)


def _same_plan(reader: CheckpointReader) -> dict[str, Planned]:
    """The source's own tensors, dtypes and shard names."""
    return {info.name: Planned(info.file.name, info.dtype, info.shape) for info in reader}


def _recount(folder: Path, run: _Run) -> None:
    """Replace the zero counts of the records by what a fresh reader finds in the written files."""
    reader = CheckpointReader(folder)
    for spec in (spec for block in run.targets for spec in block):
        stored = reader.load(spec.key)
        weight = stored.T.contiguous() if spec.transposed else stored
        zeros = check_pattern(spec.key, weight, run.pruner.treatment.patterns[spec.key])
        update = {"zeros": zeros, "sparsity": zeros / stored.numel()}
        run.pruner.records[spec.key] = run.pruner.records[spec.key].model_copy(update=update)


def _manifest(
    folder: Path, model: Model, run: _Run, calibration: CalibrationSet | None, parity: dict[str, Any]
) -> Manifest:
    with run.pruner.phases("hash"):
        source, files = describe_source(model), hash_folder(folder)
    treatment = run.pruner.treatment
    pruned = sum(record.zeros for record in run.pruner.records.values())
    size = sum(record.shape[0] * record.shape[1] for record in run.pruner.records.values())
    return Manifest(
        stage="prune",
        format="dense",
        versions=versions(),
        source=source,
        config=run.config.record(),
        calibration=calibration.record() if calibration is not None and run.config.needs_text else None,
        tensors=run.pruner.records,
        dense_tensors=sorted(set(run.decoder.reader.tensors) - set(run.pruner.records)),
        metrics={
            "sparsity_of_pruned_tensors": pruned / size,
            "patterns": summary(dict(treatment.patterns)),
            "pruned_tensors": len(run.pruner.records),
            "mean_layer_error": sum(record.layer_error or 0.0 for record in run.pruner.records.values())
            / len(run.pruner.records),
            **({} if run.rescaled is None else {"rescale": asdict(run.rescaled)}),
            **({"limits": run.limits} if run.limits else {}),
            "seconds": {name: round(value, 3) for name, value in run.pruner.phases.seconds.items()},
            "parity": parity,
        },
        files=files,
    )
