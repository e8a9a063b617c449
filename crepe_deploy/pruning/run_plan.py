"""What one run will do to one model, settled before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from crepe_deploy.device import CPU
from crepe_deploy.errors import ConfigError
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.pattern import Pattern
from crepe_deploy.store.companions import companions_of
from crepe_deploy.store.files import require_disk
from crepe_deploy.store.folders import check_output
from crepe_deploy.store.sources import Model
from crepe_deploy.store.stock import check_tokenizer
from crepe_deploy.texts import CalibrationSet

from .config import PruneConfig
from .limits import limits
from .steps.allocate import uniform
from .targets import choose_targets

PROBE_TOKENS = 64


@dataclass(frozen=True)
class RunPlan:
    """A model and what is to be done to it.

    targets: the layers to prune, by block. patterns: theirs by tensor name, all alike until an allocation says more.
    Token ids (windows, length) int64: calibration, what methods and steps read, or None; held, kept from all fits for
    repair and rescaling to judge by, or None; probe, (1, at most 64), carried along to compare logits before and after
    writing.
    limits: what will be done only in part, for want of knowledge of the family.
    """

    decoder: Decoder
    config: PruneConfig
    targets: list[list[LinearSpec]]
    patterns: Mapping[str, Pattern]
    calibration: Tensor | None
    held: Tensor | None
    probe: Tensor
    limits: list[str]


def plan_run(
    model: Model, out: Path, config: PruneConfig, calibration: CalibrationSet | None, *, overwrite: bool,
    device: torch.device = CPU,
) -> RunPlan:  # fmt: skip
    """Check everything that can be refused; device: that the run computes on. Raises InputError, DiskFullError."""
    decoder, targets, said = check_run(model, out, config, overwrite=overwrite, device=device)
    tokens = _calibration_tokens(decoder, config, calibration)
    held = None
    probe = _probe_tokens(decoder, tokens)
    if tokens is not None and (kept := config.steps.held_out(len(tokens))):
        fitted = len(tokens) - kept
        tokens, held = tokens[:fitted], tokens[fitted:]
    return RunPlan(decoder, config, targets, uniform(targets, config.pattern), tokens, held, probe, said)


def check_run(
    model: Model, out: Path, config: PruneConfig, *, overwrite: bool, device: torch.device = CPU
) -> tuple[Decoder, list[list[LinearSpec]], list[str]]:  # fmt: skip
    """Check what can be refused before there is text: the decoder, the layers to prune, what will be done in part only.

    Raises InputError, DiskFullError.
    """
    check_output(out, overwrite=overwrite, inputs=(model.folder,))
    companions_of(model.folder)
    decoder = Decoder(model.folder, config.dtype, device, experts=True)
    targets = choose_targets(decoder, config.pattern, config.include, config.exclude)
    said = limits(decoder, targets, config)
    check_tokenizer(model.folder)
    require_disk(out, sum(info.size_bytes for info in decoder.reader))
    return decoder, targets, said


def _calibration_tokens(decoder: Decoder, config: PruneConfig, calibration: CalibrationSet | None) -> Tensor | None:
    """The tokens that the run reads. Raises ConfigError where they are missing or longer than the model's context."""
    if not config.needs_text:
        return None
    if calibration is None:
        raise ConfigError(f"method '{config.origin.method}' needs calibration text: give --calib FILE_OR_DATASET")
    length = calibration.tokens.shape[1]
    if length > decoder.context_length:
        raise ConfigError(
            f"calibration windows of {length} tokens exceed the model's context of {decoder.context_length}"
        )
    return calibration.tokens


def _probe_tokens(decoder: Decoder, tokens: Tensor | None) -> Tensor:
    if tokens is not None:
        return tokens[:1, :PROBE_TOKENS]
    length = min(PROBE_TOKENS, decoder.context_length)
    return torch.randint(decoder.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
