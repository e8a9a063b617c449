"""The options of `prune` and `prune-and-export`, and what they mean. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from crepe_deploy.errors import ConfigError

if TYPE_CHECKING:
    from crepe_deploy.pruning.config import PruneConfig
    from crepe_deploy.store.sources import Model
    from crepe_deploy.texts import CalibrationSet

Command = TypeVar("Command", bound=Callable[..., Any])


def say(message: str) -> None:
    """One line on stderr."""
    click.echo(message, err=True)


def options(*several: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several click options as one decorator."""

    def decorate(command: Command) -> Command:
        for option in reversed(several):
            command = option(command)
        return command

    return decorate


def calibration_options(*, samples: int, length: int, required: bool = False) -> Callable[[Command], Command]:
    """The calibration text and how much of it is read; samples, length: the defaults."""
    return options(
        click.option("--calib", multiple=True, required=required, metavar="FILE_OR_DATASET",
                     help="Calibration text: .txt, .jsonl, .parquet or a datasets name. Several give equal shares."),
        click.option("--calib-field", default="text", show_default=True,
                     help="Field of .jsonl, .parquet or dataset rows."),
        click.option("--calib-samples", type=click.IntRange(1), default=samples, show_default=True),
        click.option("--calib-length", type=click.IntRange(2), default=length, show_default=True,
                     help="Tokens in each sample, clipped to the model's context."),
    )  # fmt: skip


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")

prune_options = options(
    click.argument("model"),
    click.option("--out", type=click.Path(path_type=Path), required=True, help="Output folder; must not exist."),
    click.option("--method", default=None, help="crepe (default), ria, wanda, sparsegpt or magnitude."),
    click.option("--sparsity", default="2:4", show_default=True, help="N:M (N kept of M) or a fraction of zeros."),
    click.option("--granularity", type=click.Choice(["row", "matrix"]), default="row", show_default=True,
                 help="Where a fraction of zeros is counted."),
    click.option("--preset", default=None, help="Named or JSON-file hyperparameters; crepe's default is 'default'."),
    click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="One hyperparameter of the method."),
    click.option("--feed", type=click.Choice(["auto", "dense", "pruned", "both"]), default=None,
                 help="Whose output calibrates the next block; auto, the default: the better one for the method."),
    click.option("--recipe", default=None,
                 help="Method and steps from a named recipe or a YAML file; options go before it."),
    click.option("--allocate", default=None, metavar="STEP", help="owl, alpha or error: layers keep different shares."),
    click.option("--permute", default=None, metavar="STEP", help="fold: reorder channels where that costs nothing."),
    click.option("--reprune", default=None, metavar="STEP", help="dsnot, dsnot-ria or swaps, inside rows and groups."),
    click.option("--reconstruct", default=None, metavar="STEP",
                 help="exact, obs or admm: fit kept weights to the output. STEP is NAME[:PARAMETER=VALUE,...]."),
    click.option("--rescale", default=None, metavar="STEP",
                 help="logits: fit their scale to the dense model on held-out calibration windows."),
    calibration_options(samples=128, length=2048),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--include", default=None, metavar="REGEX", help="Prune only tensors whose name matches."),
    click.option("--exclude", default=None, metavar="REGEX", help="Leave tensors whose name matches dense."),
    click.option("--dtype", default="auto", show_default=True, help="To compute in: auto, bfloat16, float16, float32."),
    click.option("--revision", default=None, help="Branch, tag or commit of a hub model."),
    overwrite_option,
    json_option,
)  # fmt: skip


def prepare(
    *, model: str, out: Path, sparsity: str, granularity: Any, params: tuple[str, ...], revision: str | None,
    calib: tuple[str, ...], calib_field: str, calib_samples: int, calib_length: int, seed: int, **given: Any,
) -> tuple[Model, PruneConfig, CalibrationSet | None]:  # fmt: skip
    """Resolve options into the pipeline's arguments; whatever can be refused early is."""
    from crepe_deploy.pattern import parse_pattern
    from crepe_deploy.pruning.config import prune_config
    from crepe_deploy.store.sources import require_pinned, resolve_model

    config = prune_config(pattern=parse_pattern(sparsity, granularity), params=_parse_params(params), **given)
    found = resolve_model(model, revision, say)
    require_pinned(revision, found)
    if not config.needs_text:
        return found, config, None
    return found, config, _calibration(found.folder, calib, calib_field, calib_samples, calib_length, seed)


def _calibration(
    folder: Path, calib: tuple[str, ...], calib_field: str, calib_samples: int, calib_length: int, seed: int
) -> CalibrationSet:
    from crepe_deploy.model.decoder import load_config
    from crepe_deploy.texts import calibration_windows, load_tokenizer

    if not calib:
        raise ConfigError("this method needs calibration text: give --calib FILE_OR_DATASET")
    context = int(getattr(load_config(folder), "max_position_embeddings", calib_length))
    length = min(calib_length, context)
    return calibration_windows(calib, load_tokenizer(folder), calib_samples, length, seed=seed, field=calib_field)


def _parse_params(params: tuple[str, ...]) -> dict[str, Any]:
    parsed = {}
    for param in params:
        name, equals, value = param.partition("=")
        if not equals:
            raise ConfigError(f"--param {param} is not NAME=VALUE")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed
