"""`heal`: a pruned model trained back towards its dense parent, its zeros held."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crepe_deploy.device import chosen
from crepe_deploy.errors import ConfigError
from crepe_deploy.healing.config import DEFAULT_STEPS, HealConfig
from crepe_deploy.healing.heal import check_extras
from crepe_deploy.healing.heal import heal as heal_folder
from crepe_deploy.model.architecture import load_config
from crepe_deploy.model.decoder import refuse_experts
from crepe_deploy.progress import Later, Say, Show, hidden, unsaid
from crepe_deploy.selftext import SELF
from crepe_deploy.store.folders import check_output, held
from crepe_deploy.store.manifest import Manifest
from crepe_deploy.store.sources import Model

from .inputs import Calibration, Mixture, check_calibration, find_model, sources_of

if TYPE_CHECKING:
    from crepe_deploy.exporting.heal import Healing


def heal(
    folder: str | Path, out: str | Path, *, dense: str | Path, text: str | Path | Sequence[str | Path],
    text_field: str = "text", steps: int | None = None, minutes: float | None = None, learning_rate: float = 2e-4,
    batch_tokens: int = 2048, window: int = 512, accumulate: int = 1, checkpointing: bool = False,
    top_k: int | None = None, lora: int | None = None, train: str | Sequence[str] = "norms,kept", dtype: str = "auto",
    device: str = "auto", holdout: float = 0.05, seed: int = 0, revision: str | None = None, resume: bool = False,
    overwrite: bool = False, show: Show | None = None, say: Say | None = None,
) -> Manifest:  # fmt: skip
    """Train the pruned model in `folder` towards the model it came from; `out` is a folder of the same kind.

    folder: written by `prune`, `export --format dense` or `tyr`. dense: its parent, as `model` of `prune`; the manifest
    knows it. text: files or `datasets` names. steps, minutes: the budget; without either 200 steps. batch_tokens: in a
    step, in windows of `window`. accumulate: parts a step is computed in; checkpointing: activations are computed
    twice; both save memory. top_k: compare the dense model's likeliest tokens alone. lora: rank of adapters trained in
    place of the kept weights. train: "norms", "kept" or both. dtype: to compute in. device: as in `prune`; several
    processes take a GPU each where it is a GPU. holdout: share of each text that decides the best step.
    resume: go on with OUT.work, which a stopped run leaves. Defaults are a start, not tuned.
    Every zero stays, counted on the disk. Equal seeds and steps give equal bytes on one machine. Returns the manifest,
    whose `config["healed"]` says what was trained on what.
    Raises ConfigError, CheckpointError (not the parent), CalibrationError (too little text), OutputError, MissingExtra
    (exit code 2) before any work; NumericalError where nothing became better, VerifyError, DiskFullError (1).
    """
    from crepe_deploy.exporting.heal import seal

    texts = [text] if isinstance(text, str | Path) else list(text)
    given = Path(os.path.expanduser(dense))  # noqa: PTH111 - this one raises nothing
    parts = train.split(",") if isinstance(train, str) else list(train)
    config = HealConfig(
        steps=steps, minutes=minutes, learning_rate=learning_rate, batch_tokens=batch_tokens, window=window,
        accumulate=accumulate, checkpointing=checkpointing, top_k=top_k, lora=lora,
        train=tuple(part.strip() for part in parts), dtype=dtype, seed=seed, holdout=holdout,
    )  # fmt: skip
    config.check()
    check_extras(config)
    check_output(Path(out), overwrite=overwrite, inputs=(Path(folder), *([given] if given.exists() else [])))
    check_calibration(*texts)
    later = Later(say)
    if steps is None and minutes is None:
        later(f"the budget is {DEFAULT_STEPS} steps (--steps or --minutes chooses)")
    place = chosen(device, later)
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun and accelerate start
    with held(Path(out)) if first else nullcontext():
        return heal_folder(
            Path(folder), find_model(dense, revision, say), Path(out), config, texts, text_field, resume=resume,
            overwrite=overwrite, show=later.show(show), say=later, seal=partial(seal, Path(folder)), device=place,
        )  # fmt: skip


def check_healing(minutes: float | None, calib: Calibration | None) -> None:
    """Refuse healing, where minutes are given, on what is no text to be read again, tokens or the model's own for
    example, and without its libraries. Raises ConfigError, MissingExtra."""
    if minutes is None:
        return
    check_extras(HealConfig(minutes=minutes))
    several = calib.sources if isinstance(calib, Mixture) else [calib]
    texts = [source for source in sources_of(calib) if source != SELF]
    if not texts or len(texts) < len(several):
        raise ConfigError("--heal trains on the calibration text: give --calib FILE_OR_DATASET")


def healing_of(
    model: Model, minutes: float | None, calib: Calibration | None, field: str, seed: int, show: Show | None,
    say: Say | None, device: torch.device,
) -> Healing | None:  # fmt: skip
    """Healing for so many minutes on the calibration text, at the defaults of `heal`; None for None.

    Raises as `check_healing` does.
    """
    from crepe_deploy.exporting.heal import Healing

    if minutes is None:
        return None
    check_healing(minutes, calib)
    refuse_experts(model.folder)
    texts = sources_of(calib)
    context = int(getattr(load_config(model.folder), "max_position_embeddings", None) or HealConfig.window)
    config = HealConfig(minutes=minutes, window=min(HealConfig.window, context), seed=seed)
    config.check()
    return Healing(model, config, texts, field, show or hidden, say or unsaid, device)
