"""The pruning pipeline: block by block, materialise, calibrate, score, select, write, and prove what was written."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .audit import check_pattern
from .calibrate import Collector, Stream, embed
from .checkpoint import CheckpointReader
from .companions import copy_companions
from .errors import ConfigError
from .families import Decoder, LinearSpec
from .manifest import Manifest, TensorRecord, hash_folder, save_manifest, versions
from .methods import get_method
from .methods.base import ScoreMethod, SolveMethod, Stats
from .pattern import Pattern, check_divides
from .progress import Step, silent
from .proof import check_parity
from .select import select
from .sources import Model, describe_source
from .texts import CalibrationSet
from .writing import CheckpointWriter, Planned, atomic_folder, check_output, require_disk

FEEDS = ("auto", "dense", "pruned")
PROBE_TOKENS = 64


@dataclass(frozen=True)
class PruneConfig:
    """Everything that decides the result, besides the model and the calibration tokens.

    include/exclude: regular expressions searched in the tensor's checkpoint name; exclude wins.
    feed: what the next block is fed while calibrating: "dense" the dense block's output, "pruned" the pruned one's,
    "auto" the method's own choice.
    dtype: of computation, "auto" = the checkpoint's.
    """

    method: str
    pattern: Pattern
    params: dict[str, Any] = field(default_factory=dict)
    preset: str | None = None
    feed: Literal["auto", "dense", "pruned"] = "auto"
    include: str | None = None
    exclude: str | None = None
    dtype: str = "auto"

    def record(self) -> dict[str, Any]:
        """As JSON for the manifest."""
        return {**vars(self), "pattern": str(self.pattern)}


class Phases:
    """Wall-clock seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


@dataclass
class _Run:
    """One run's fixed parts, so that the steps below take few arguments."""

    decoder: Decoder
    config: PruneConfig
    method: ScoreMethod | SolveMethod
    targets: list[list[LinearSpec]]
    phases: Phases = field(default_factory=Phases)
    records: dict[str, TensorRecord] = field(default_factory=dict)


def prune(
    model: Model,
    out: Path,
    config: PruneConfig,
    calibration: CalibrationSet | None,
    *,
    overwrite: bool = False,
    step: Step = silent,
) -> Manifest:
    """Prune `model` into the checkpoint folder `out`, which appears whole and verified or not at all.

    calibration: needed by methods with statistics. step: called after each block.
    Returns the manifest that was written. Raises InputError before any work that could be spared,
    NumericalError, DiskFullError, VerifyError, ParityError.
    """
    run, calibration_tokens = _prepare(model, out, config, calibration, overwrite)
    with atomic_folder(out, overwrite=overwrite) as folder:
        probe = _probe_tokens(run.decoder, calibration_tokens)
        logits = _prune_into(folder, run, calibration_tokens, probe, step)
        copy_companions(model.folder, folder)
        with run.phases("verify"):
            _recount(folder, run)
            parity = check_parity(folder, config.dtype, probe, logits)
        manifest = _manifest(folder, model, run, calibration, parity)
        save_manifest(folder, manifest)
    return manifest


def _prepare(
    model: Model, out: Path, config: PruneConfig, calibration: CalibrationSet | None, overwrite: bool
) -> tuple[_Run, Tensor | None]:
    """Everything that can be refused is refused here, before any weight is read."""
    if config.feed not in FEEDS:
        raise ConfigError(f"feed '{config.feed}' is unknown; known: {', '.join(FEEDS)}")
    method = get_method(config.method, **config.params)
    check_output(out, overwrite=overwrite, inputs=(model.folder,))
    decoder = Decoder(model.folder, config.dtype)
    targets = choose_targets(decoder, config.pattern, config.include, config.exclude)
    if method.needs and calibration is None:
        raise ConfigError(f"method '{config.method}' needs calibration text: give --calib FILE_OR_DATASET")
    require_disk(out, sum(info.size_bytes for info in decoder.reader))
    tokens = calibration.tokens if calibration is not None and method.needs else None
    if tokens is not None and tokens.shape[1] > decoder.context_length:
        raise ConfigError(
            f"calibration windows of {tokens.shape[1]} tokens exceed the model's context of {decoder.context_length}"
        )
    feed = method.feed if config.feed == "auto" else config.feed
    return _Run(decoder, replace(config, feed=feed), method, targets), tokens


def choose_targets(
    decoder: Decoder, pattern: Pattern, include: str | None, exclude: str | None
) -> list[list[LinearSpec]]:
    """The linears to prune in each block. Raises ConfigError when none is left, PatternError naming a misfit."""
    try:
        wanted = re.compile(include or "")
        unwanted = re.compile(exclude) if exclude else None
    except re.error as error:
        raise ConfigError(f"--include/--exclude is not a regular expression: {error}") from error
    targets = [
        [spec for spec in block if wanted.search(spec.key) and not (unwanted and unwanted.search(spec.key))]
        for block in decoder.linears
    ]
    if not any(targets):
        raise ConfigError(f"--include/--exclude leave nothing to prune; names look like {decoder.linears[0][0].key}")
    for spec in (spec for block in targets for spec in block):
        check_divides(pattern, spec.key, spec.in_features)
    return targets


def _probe_tokens(decoder: Decoder, tokens: Tensor | None) -> Tensor:
    """Tokens (1, <=64) carried through the pruned blocks to compare logits before and after writing."""
    if tokens is not None:
        return tokens[:1, :PROBE_TOKENS]
    length = min(PROBE_TOKENS, decoder.context_length)
    return torch.randint(decoder.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _prune_into(folder: Path, run: _Run, tokens: Tensor | None, probe_tokens: Tensor, step: Step) -> Tensor:
    """Write the pruned checkpoint's tensors into `folder`; returns the pruned model's logits on the probe."""
    decoder = run.decoder
    with CheckpointWriter(folder, _same_plan(decoder.reader)) as writer:
        with run.phases("embed"):
            streams = embed(decoder, [probe_tokens] if tokens is None else [probe_tokens, tokens])
        probe, stream = streams[0], (streams[1] if tokens is not None else None)
        written: set[str] = set()
        for index in range(len(decoder.blocks)):
            with decoder.block(index) as (_, weights):
                _prune_block(run, index, stream, weights)
                with run.phases("forward"):
                    probe.run(decoder.blocks[index], index, advance=True)
                with run.phases("write"):
                    for name, tensor in weights.items():
                        writer.write(name, tensor)
                        written.add(name)
            step(index + 1, len(decoder.blocks))
        with run.phases("write"):
            for info in decoder.reader:
                if info.name not in written:
                    writer.write(info.name, decoder.reader.load(info.name))
    with run.phases("verify"):
        return decoder.logits(probe_tokens, probe.hidden[0])


def _prune_block(run: _Run, index: int, stream: Stream | None, weights: dict[str, Tensor]) -> None:
    """Collect statistics, prune every target of the block in place, and feed the next block."""
    block, targets = run.decoder.blocks[index], run.targets[index]
    last = index == len(run.targets) - 1
    collector = Collector(run.method.needs)
    if stream is not None:
        with run.phases("forward"), collector.watching(block, targets):
            stream.run(block, index, advance=run.config.feed == "dense")
    for spec in targets:
        stats = collector.stats(spec.path, stream.sequences) if stream is not None else Stats()
        stored = weights[spec.key]
        run.records[spec.key] = _prune_linear(run, stored.T if spec.transposed else stored, spec, stats)
        computed = block.get_submodule(spec.path).get_parameter("weight")
        if computed.dtype != stored.dtype:
            computed.data.copy_(stored)
    if stream is not None and run.config.feed == "pruned" and not last:
        with run.phases("forward"):
            stream.run(block, index, advance=True)


def _prune_linear(run: _Run, weight: Tensor, spec: LinearSpec, stats: Stats) -> TensorRecord:
    """Prune weight (out, in) in place. Kept weights are untouched by score methods and updated by solvers."""
    notes: dict[str, float] = {}
    if isinstance(run.method, SolveMethod):
        with run.phases("solve"):
            solution = run.method.solve(weight, stats, run.config.pattern)
            pruned, notes = solution.weight.to(weight.dtype).masked_fill_(~solution.mask, 0), solution.notes
    else:
        with run.phases("score"):
            score = run.method.score(weight, stats)
        with run.phases("select"):
            mask = select(score, run.config.pattern)
        with run.phases("update"):
            pruned = weight.masked_fill(~mask, 0)
    with run.phases("error"):
        norms = input_norms(stats)
        error = layer_error(weight, pruned, norms)
    weight.copy_(pruned)
    stored_shape = (spec.in_features, spec.out_features) if spec.transposed else (spec.out_features, spec.in_features)
    return TensorRecord(
        shape=stored_shape,
        transposed=spec.transposed,
        pattern=str(run.config.pattern),
        zeros=0,
        sparsity=0.0,
        layer_error=error,
        layer_error_weighting="none" if norms is None else "input-norm",
        notes=notes,
    )


def input_norms(stats: Stats) -> Tensor | None:
    """Norms (in,) of the input channels from whichever statistic was collected, or None."""
    if stats.hessian is not None:
        return (stats.hessian.diagonal() / 2).sqrt()
    return stats.col_norm


def layer_error(dense: Tensor, pruned: Tensor, col_norm: Tensor | None) -> float:
    """||(W - W')D||_F / ||W D||_F for weights (out, in), D = diag(col_norm) or the identity."""
    change, size = 0.0, 0.0
    for before, after in zip(torch.split(dense, 1024), torch.split(pruned, 1024), strict=True):
        before = before.float()
        change += _weighted_square(before - after, col_norm)
        size += _weighted_square(before, col_norm)
    return (change / size) ** 0.5 if size else 0.0


def _weighted_square(matrix: Tensor, col_norm: Tensor | None) -> float:
    squares = matrix.square().sum(0)
    return float(squares.sum() if col_norm is None else squares @ col_norm.square())


def _same_plan(reader: CheckpointReader) -> dict[str, Planned]:
    """The source's own tensors, dtypes and shard names."""
    return {info.name: Planned(info.file.name, info.dtype, info.shape) for info in reader}


def _recount(folder: Path, run: _Run) -> None:
    """Replace the zero counts of the records by what a fresh reader finds in the written files."""
    reader = CheckpointReader(folder)
    for spec in (spec for block in run.targets for spec in block):
        stored = reader.load(spec.key)
        weight = stored.T.contiguous() if spec.transposed else stored
        zeros = check_pattern(spec.key, weight, run.config.pattern)
        update = {"zeros": zeros, "sparsity": zeros / stored.numel()}
        run.records[spec.key] = run.records[spec.key].model_copy(update=update)


def _manifest(
    folder: Path, model: Model, run: _Run, calibration: CalibrationSet | None, parity: dict[str, Any]
) -> Manifest:
    with run.phases("hash"):
        source, files = describe_source(model), hash_folder(folder)
    pruned = sum(record.zeros for record in run.records.values())
    size = sum(record.shape[0] * record.shape[1] for record in run.records.values())
    return Manifest(
        stage="prune",
        format="dense",
        versions=versions(),
        source=source,
        config={**run.config.record(), "resolved_method": _describe_method(run.method)},
        calibration=calibration.record() if calibration is not None and run.method.needs else None,
        tensors=run.records,
        dense_tensors=sorted(set(run.decoder.reader.tensors) - set(run.records)),
        metrics={
            "sparsity_of_pruned_tensors": pruned / size,
            "pruned_tensors": len(run.records),
            "mean_layer_error": sum(record.layer_error or 0.0 for record in run.records.values()) / len(run.records),
            "seconds": {name: round(value, 3) for name, value in run.phases.seconds.items()},
            "parity": parity,
        },
        files=files,
    )


def _describe_method(method: ScoreMethod | SolveMethod) -> dict[str, Any]:
    return {"class": type(method).__name__, **vars(method)}
