"""`tyr`: structural pruning, whole KV groups and FFN neurons removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from crepe_deploy.device import chosen
from crepe_deploy.progress import Later, Say, Show
from crepe_deploy.selftext import SELF
from crepe_deploy.structural.config import TyrConfig
from crepe_deploy.structural.local import DEFAULT_VARIANT
from crepe_deploy.structural.tyr import tyr as prune_structurally

from .choices import OWN_DOMAIN
from .heal import check_healing, healing_of
from .inputs import Calibration, check_base_model, check_calibration, find_model, output, windows_of


def tyr(
    model: str | Path, out: str | Path, *, calib: Calibration | None = None, sparsity: float = 0.5,
    method: Literal["tyr", "flap", "uniform", "magnitude", "random"] = "tyr",
    widths: Literal["per-layer", "uniform"] = "per-layer", calib_field: str = "text", calib_samples: int = 16,
    calib_length: int = 512, search_samples: int = 0, iterations: int = 4, generations: int = 10, offspring: int = 16,
    ffn_multiple: int = 128, attention: Literal["auto", "groups", "queries"] = "auto",
    attention_share: float | str | None = None, accumulation: str = "expectation", variant: str | None = None,
    fitness: Literal["logits", "hidden"] = "logits", top_k: int = 1024, refit: bool | None = None,
    finish: Literal["paired", "single", "supernet"] = "single", repair: str | None = None,
    layout: Literal["plugin", "deci"] = "plugin", remote_code: bool = False, base_model: str | None = None,
    heal: float | None = None, seed: int = 0, dtype: str = "auto", device: str = "auto", revision: str | None = None,
    resume: bool = False, overwrite: bool = False, show: Show | None = None, say: Say | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Remove attention units and FFN neurons from `model`; OUT/dense/ is a physically smaller checkpoint.

    model, calib, calib_*, seed, dtype, device, revision: as in `prune`; without `calib` the model writes it. Tokens
    given are `calib_samples` windows and then `search_samples` that only the search sees. sparsity: share of the
    decoder layers' linear parameters to remove; embeddings, norms and lm_head stay. method: "tyr" searches the widths,
    the others are baselines. widths: "uniform" is one width for all layers, a plain checkpoint. repair: "block":
    as in `prune`, once the layers are narrow; a quarter of the windows, at most 8, judges it. The rest:
    `structural.config.TyrConfig` and docs/tyr.md.
    heal: minutes for which the smaller model is trained on the calibration text, as `heal` does.
    base_model: hub id of the parent, for the card.
    layout, remote_code: of the folder, docs/structural-serving.md. resume: go on with OUT.work, which a stopped run
    leaves; on the command line that is exit code 75. show: wraps a label for each long step and yields its progress.
    Returns the report that is written to OUT/report.json, the path `out` besides. Seconds and bytes unless named.
    Raises ConfigError, OutputError, UnsupportedModel, CalibrationError (exit code 2) before the search;
    NumericalError, VerifyError, ParityError, DiskFullError (1).
    Source: Tyr-the-Pruner, docs/tyr.md.
    """
    from crepe_deploy.exporting.tyr import FolderWriter

    check_base_model(base_model)
    config = TyrConfig(
        sparsity=sparsity, method=method, widths=widths, iterations=iterations, generations=generations,
        offspring=offspring, multiple=ffn_multiple, attention=attention, attention_share=attention_share,
        accumulation=accumulation, variant=variant or DEFAULT_VARIANT, fitness=fitness, top_k=top_k, refit=refit,
        finish=finish, repair=repair, search_samples=search_samples, seed=seed, dtype=dtype,
    )  # fmt: skip
    config.check()
    check_healing(heal, calib)
    check_calibration(calib)
    with output(out, model, overwrite=overwrite):
        later = Later(say)
        shown, place = later.show(show), chosen(device, later)
        source = find_model(model, revision, say)
        healing = healing_of(source, heal, calib, calib_field, seed, shown, later, place)
        writer = FolderWriter(widths, layout, remote_code, healing, base_model)
        writer.check(source)
        if calib is None:
            later(f"chosen: --calib {SELF}; {OWN_DOMAIN}")
        samples = calib_samples + search_samples
        given = SELF if calib is None else calib
        text = windows_of(source, given, calib_field, samples, calib_length, seed, later, shown, place)
        return prune_structurally(
            source, Path(out), config, text, resume=resume, overwrite=overwrite, show=shown, say=later,
            write=writer, device=place,
        )  # fmt: skip
