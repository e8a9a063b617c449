"""`prune` and `prune-and-export`: from a model to a pruned checkpoint, and on to the formats that are served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crepe_deploy.device import chosen as chosen_device
from crepe_deploy.errors import ConfigError
from crepe_deploy.pattern import Pattern
from crepe_deploy.progress import Later, Progress, Say, parts
from crepe_deploy.pruning.config import PruneConfig, prune_config
from crepe_deploy.pruning.prune import prune as prune_checkpoint
from crepe_deploy.pruning.recipe import load_recipe
from crepe_deploy.pruning.run_plan import check_run
from crepe_deploy.selftext import SELF
from crepe_deploy.store.manifest import Manifest
from crepe_deploy.store.sources import Model
from crepe_deploy.store.values import AGAIN
from crepe_deploy.texts import CalibrationSet

from .choices import FIXED, Given, Target, choices_of, filled
from .heal import check_healing, healing_of
from .inputs import (
    Calibration,
    Granularity,
    check_base_model,
    check_calibration,
    export_options,
    find_model,
    output,
    pattern_of,
    sources_of,
    windows_of,
)


def prune(
    model: str | Path, out: str | Path, *, target: Target | None = None,
    sparsity: Pattern | str | float | None = None, granularity: Granularity = "row", method: str | None = None,
    preset: str | Path | None = None, params: Mapping[str, Any] | None = None, recipe: str | Path | None = None,
    feed: str | None = None, allocate: str | None = None, permute: str | None = None, reprune: str | None = None,
    reconstruct: str | None = None, repair: str | None = None, rescale: str | None = None, values: str | None = None,
    calib: Calibration | None = None, calib_field: str = "text", calib_samples: int | None = None,
    calib_length: int | None = None, seed: int = 0, include: str | None = None, exclude: str | None = None,
    dtype: str = "auto", device: str = "auto", base_model: str | None = None, revision: str | None = None,
    resume: bool = False, overwrite: bool = False, progress: Progress | None = None, say: Say | None = None,
) -> Manifest:  # fmt: skip
    """Prune the linear layers of `model` into the Hugging Face folder `out`, and return its manifest.

    model: a folder, a GGUF file (dequantised) or a hub id, pinned by `revision`. out: appears whole and verified or
    not at all. target: "cpu" or "gpu", where the result is served, "auto" for this machine; what is left out is chosen
    for it, said, and recorded as `config["chosen"]` (docs/choose.md). sparsity: "2:4" keeps 2 of every 4 consecutive
    inputs; 0.5 is the share of zeros, counted in each row or over the `granularity` "matrix". method: "crepe", "ria",
    "wanda", "sparsegpt" or "magnitude".
    preset, params: its hyperparameters, by name or file and one by one. recipe: method and steps, a name or YAML file;
    arguments go before it, and one that heals is for `prune_and_export`. feed: whose output calibrates the next block,
    "auto", "dense", "pruned" or "both".
    allocate, permute, reprune, reconstruct, repair, rescale, values: steps, "NAME" or "NAME:PARAMETER=VALUE,..."
    (docs/methods.md); values, "int8" or "int4", writes the kept weights as codes times scales, which go beside them.
    calib: a file or `datasets` name, "self" for text that the model writes itself, a `Mixture` of them, a list of
    documents, or token ids, an integer tensor (samples, length). calib_samples, calib_length: windows drawn, and
    tokens in each, clipped to the model's context.
    include, exclude: regular expressions searched in tensor names. dtype: to compute in, "auto" is the checkpoint's.
    device: to compute on, "cpu", "cuda", "cuda:N", or "auto": the first GPU that torch sees, else the CPU.
    base_model: hub id of the parent, for the model card.
    resume: go on with OUT.work, which a stopped run leaves: the same bytes, at most one block is pruned again; on the
    command line that is exit code 75. progress: told pieces of work done and in all. say: told what is chosen, fetched.
    Raises ConfigError, PatternError, CheckpointError, UnsupportedModel, CalibrationError, OutputError, MissingExtra
    (exit code 2) before any work that could be spared; NumericalError, VerifyError, ParityError, DiskFullError (1).
    Source of each method: docs/methods.md, docs/crepe.md.
    """
    from crepe_deploy.exporting.prune import seal

    check_base_model(base_model)
    _check_untrained(recipe)
    asked = {
        "method": method, "preset": preset, "params": params, "recipe": recipe, "feed": feed, "allocate": allocate,
        "permute": permute, "reprune": reprune, "reconstruct": reconstruct, "repair": repair, "rescale": rescale,
        "values": values, "include": include, "exclude": exclude, "dtype": dtype,
    }  # fmt: skip
    left = _checked(
        Given(target, sparsity, granularity, calib is not None, calib_samples, calib_length, exports=False), asked
    )
    check_calibration(calib)
    with output(out, model, overwrite=overwrite):
        later = Later(say)
        step, place = later.step(progress), chosen_device(device, later)
        source = find_model(model, revision, say)
        config, options = _resolved(source, asked, left, later)
        if SELF in sources_of(options["calib"] if calib is None else calib):
            check_run(source, Path(out), config, overwrite=overwrite)
        windows = _windows(config, source, calib, calib_field, options, seed, later, step, place)
        return prune_checkpoint(
            source, Path(out), config, windows, resume=resume, overwrite=overwrite, step=step,
            device=place, seal=partial(seal, base_model=base_model),
        )  # fmt: skip


def prune_and_export(
    model: str | Path, out: str | Path, *, format: str | Sequence[str] | None = None, onnx_flavor: str | None = None,
    precision: str | None = None, quantise: str | None = None, target: Target | None = None,
    sparsity: Pattern | str | float | None = None, granularity: Granularity = "row", method: str | None = None,
    preset: str | Path | None = None, params: Mapping[str, Any] | None = None, recipe: str | Path | None = None,
    feed: str | None = None, allocate: str | None = None, permute: str | None = None, reprune: str | None = None,
    reconstruct: str | None = None, repair: str | None = None, rescale: str | None = None, values: str | None = None,
    calib: Calibration | None = None, calib_field: str = "text", calib_samples: int | None = None,
    calib_length: int | None = None, seed: int = 0, include: str | None = None, exclude: str | None = None,
    dtype: str = "auto", device: str = "auto", heal: float | None = None, base_model: str | None = None,
    revision: str | None = None, resume: bool = False, overwrite: bool = False, progress: Progress | None = None,
    say: Say | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Prune `model` and write OUT/FORMAT/ for each format; returns the report that is OUT/report.json.

    format: one or more of "dense", "packed", "int8", "onnx" and "gguf", a list or comma-separated. onnx_flavor,
    precision, quantise: as in `export`. heal: minutes for which the pruned model is trained on the calibration text
    before it is exported, as by `heal`; None: the recipe's. base_model: hub id of the parent, for the model cards.
    resume: as in `prune`; other formats may be asked for.
    The rest, and what is raised, as in `prune`. The report names the source, what was resolved
    (method, parameters, steps, patterns), `sparsity_of_pruned_tensors` (zeros over entries, counted on
    disk), `seconds` by phase, `parity` of the logits, and for each format its path, `weight_file_bytes` and `size`.
    """
    from crepe_deploy.exporting.pipeline import prune_and_export as run
    from crepe_deploy.exporting.registry import build

    check_base_model(base_model)
    minutes = _minutes(recipe) if heal is None else heal
    check_healing(minutes, calib)
    written = export_options(onnx_flavor, precision, quantise)
    if format is not None:
        build(_names(format), written)
    asked = {
        "method": method, "preset": preset, "params": params, "recipe": recipe, "feed": feed, "allocate": allocate,
        "permute": permute, "reprune": reprune, "reconstruct": reconstruct, "repair": repair, "rescale": rescale,
        "values": values, "include": include, "exclude": exclude, "dtype": dtype,
    }  # fmt: skip
    left = _checked(
        Given(target, sparsity, granularity, calib is not None, calib_samples, calib_length, format), asked,
        healed=minutes is not None,
    )  # fmt: skip
    check_calibration(calib)
    with output(out, model, overwrite=overwrite):
        later = Later(say)
        step, place = later.step(progress), chosen_device(device, later)
        source = find_model(model, revision, say)
        config, options = _resolved(source, asked, left, later)
        formats = _names(options["format"])
        for exporter in build(formats, written):
            exporter.check_pruning(source.folder, config)
        healing = healing_of(source, minutes, calib, calib_field, seed, parts(step), later, place)
        if SELF in sources_of(options["calib"] if calib is None else calib):
            check_run(source, Path(out), config, overwrite=overwrite)
        windows = _windows(config, source, calib, calib_field, options, seed, later, step, place)
        return run(
            source, Path(out), config, windows, formats=formats, resume=resume, overwrite=overwrite,
            step=step, options=written, healing=healing, base_model=base_model, device=place,
        )  # fmt: skip


def _minutes(recipe: str | Path | None) -> float | None:
    """For how long a recipe heals."""
    return None if recipe is None else load_recipe(recipe).heal


def _check_untrained(recipe: str | Path | None) -> None:
    """Raise ConfigError for a recipe that heals."""
    if _minutes(recipe) is not None:
        raise ConfigError(
            f"recipe '{recipe}' trains what is pruned, which prune does not: give it to prune-and-export, or prune "
            "with another recipe and train the folder with the command heal"
        )


def _names(format: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in format.split(",")] if isinstance(format, str) else list(format)


def _checked(left: Given, asked: Mapping[str, Any], healed: bool = False) -> Given:
    """What was given, with what the options of `prune_config` say of it; these are refused before a model is fetched.

    healed: whether training follows. Raises ConfigError, PatternError.
    """
    pattern = FIXED["sparsity"] if left.sparsity is None else left.sparsity
    checked = prune_config(pattern=pattern_of(pattern, left.granularity), **asked)
    if healed and checked.steps.values is not None:
        raise ConfigError(
            f"--heal trains kept weights, and --values has them on a grid by then: heal first, and quantise {AGAIN}"
        )
    named = any(value for name, value in asked.items() if name not in ("recipe", "dtype", "values"))
    return replace(left, named=named, recipe=asked["recipe"] is not None, needs_text=checked.needs_text)


def _resolved(
    model: Model, asked: Mapping[str, Any], left: Given, say: Say
) -> tuple[PruneConfig, dict[str, Any]]:  # fmt: skip
    """What is done to the model, and the other options; what was left out is chosen, and said."""
    chosen = choices_of(left, model.folder, say)
    options = filled(left.options, chosen)
    method = {name: value for name, value in chosen.items() if name in asked}
    config = prune_config(pattern=pattern_of(options["sparsity"], left.granularity), **{**asked, **method})
    return replace(config, origin=replace(config.origin, chosen=chosen)), options


def _windows(
    config: PruneConfig, model: Model, calib: Calibration | None, field: str, options: Mapping[str, Any], seed: int,
    say: Say, step: Progress, device: torch.device,
) -> CalibrationSet | None:  # fmt: skip
    if not config.needs_text:
        return None
    text = options["calib"] if calib is None else calib
    samples, length = options["calib_samples"], options["calib_length"]
    return windows_of(model, text, field, samples, length, seed, say, parts(step), device)
