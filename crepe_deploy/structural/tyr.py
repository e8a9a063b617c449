"""Structural pruning from a model to the plan of every layer: refuse early, find widths, prune to them, report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from crepe_deploy.device import CPU, described
from crepe_deploy.machine import peak_rss_bytes
from crepe_deploy.progress import Say, Show
from crepe_deploy.store.manifest import versions
from crepe_deploy.store.sources import Model
from crepe_deploy.store.work import removed_once_written
from crepe_deploy.texts import CalibrationSet

from .config import TyrConfig
from .plan import LayerPlan
from .prepare import Run, prepare_run
from .stages import find_widths, finish, repaired


@dataclass(frozen=True)
class TyrResult:
    """What was found. plans: one for each layer. report: JSON-ready, for the manifest and the user."""

    model: Model
    config: TyrConfig
    calibration: CalibrationSet
    plans: Sequence[LayerPlan]
    report: dict[str, Any]


class Writer(Protocol):
    """What makes a folder of a result."""

    def check(self, model: Model) -> None:
        """Raise ConfigError or UnsupportedModel for a model that cannot be written, before the search."""
        ...

    def __call__(self, result: TyrResult, out: Path, overwrite: bool) -> dict[str, Any]:
        """Write `out` whole or not at all; returns what the report gains by it."""
        ...


def tyr(
    model: Model, out: Path, config: TyrConfig, calibration: CalibrationSet, *,
    resume: bool, overwrite: bool, show: Show, say: Say, write: Writer, device: torch.device = CPU,
) -> dict[str, Any]:  # fmt: skip
    """Prune `model` structurally and let `write` make what belongs into `out`; returns the report with what it adds.

    The folder OUT.work holds what a stopped run goes on from with `resume`; it is removed at the end. device: that
    computes.
    Raises ConfigError, OutputError, UnsupportedModel, DiskFullError before any work, NumericalError, VerifyError.
    """
    started = time.monotonic()
    write.check(model)
    run = prepare_run(
        model, out, config, calibration, resume=resume, overwrite=overwrite, show=show, say=say, device=device
    )
    widths, facts = find_widths(run)
    plans, repair = repaired(run, finish(run, widths))
    report = _report(run, plans, facts | repair, time.monotonic() - started)
    with removed_once_written(run.work, out):
        written = write(TyrResult(model, config, calibration, plans, report), out, overwrite)
    return {"out": str(out), **report, **written}


def _report(run: Run, plans: Sequence[LayerPlan], facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    dense, kept = run.geometry.parameters, sum(plan.parameters(run.geometry) for plan in plans)
    return {
        "method": run.config.method,
        "widths": run.config.widths,
        "sparsity": {"asked": run.config.sparsity, "reached": 1 - kept / dense},
        "parameters": {
            "what": "linear parameters of the decoder layers; embeddings, norms and lm_head are untouched",
            "dense": dense,
            "kept": kept,
            "attention_unit": run.units.attention,
            "attention_unit_parameters": run.units.attention_parameters,
            "ffn_unit_parameters": run.units.neuron_parameters,
        },
        "layers": [
            {"heads": plan.heads, "kv_heads": plan.kv_heads, "intermediate_size": plan.intermediate_size}
            for plan in plans
        ],
        "config": asdict(run.config),
        "calibration": run.calibration.record(),
        **facts,
        "device": described(run.decoder.device),
        "seconds": {**{name: round(value, 2) for name, value in run.phases.seconds.items()}, "all": round(seconds, 2)},
        "peak_rss_bytes": peak_rss_bytes(),
        "versions": versions(),
    }
