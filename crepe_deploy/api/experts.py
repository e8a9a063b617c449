"""`experts`: whole experts removed from a mixture-of-experts model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from crepe_deploy.device import chosen
from crepe_deploy.errors import ConfigError
from crepe_deploy.moe.config import ExpertsConfig
from crepe_deploy.progress import Later, Say, Show

from .inputs import Calibration, check_base_model, check_calibration, find_model, output, windows_of


def experts(
    model: str | Path, out: str | Path, *, remove: float = 0.25, method: str = "reap", calib: Calibration | None = None,
    calib_field: str = "text", calib_samples: int = 128, calib_length: int = 2048,
    scores: str | Path | None = None, base_model: str | None = None, seed: int = 0, dtype: str = "auto",
    device: str = "auto", revision: str | None = None, resume: bool = False, overwrite: bool = False,
    show: Show | None = None, say: Say | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Remove whole experts of every layer of `model`; OUT/dense/ is an ordinary checkpoint with fewer of them.

    model, calib, calib_*, seed, dtype, device, revision: as in `prune`. remove: the share of each layer's experts,
    below 1, or their number. method: "reap", "output-error", "frequency" or "random" (docs/experts.md). scores:
    OUT/scores.safetensors of an earlier run on the same model, instead of `calib`: no text passes through it,
    whatever the share and the method. base_model: hub id of the parent, for the card. show: wraps a label for each
    long step and yields its progress. resume: go on with OUT.work, which a stopped run leaves (on the command line
    exit code 75): the same bytes, at most one layer is measured again.
    Returns the report that is written to OUT/report.json, the path `out` besides. Raises ConfigError, OutputError,
    UnsupportedModel, CalibrationError, CheckpointError (exit code 2) before any work; NumericalError, ParityError,
    DiskFullError (1).
    """
    from crepe_deploy.exporting.experts import OWN, remove_experts

    check_base_model(base_model)
    if (calib is None) == (scores is None):
        raise ConfigError("experts are measured on text, --calib FILE_OR_DATASET, or were before: --scores FILE")
    config = ExpertsConfig(remove, method, seed, dtype)
    config.check()
    check_calibration(calib)
    with output(out, model, overwrite=overwrite, own=OWN):
        later = Later(say)
        shown, place = later.show(show), chosen(device, later)
        source = find_model(model, revision, say)
        windows = None
        if calib is not None:
            windows = partial(
                windows_of, source, calib, calib_field, calib_samples, calib_length, seed, later, shown, place
            )
        return remove_experts(
            source, Path(out), config, windows, None if scores is None else Path(scores),
            resume=resume, overwrite=overwrite, show=shown, base_model=base_model, device=place,
        )  # fmt: skip
