"""The command `search`, defined without heavy imports so that `--help` stays quick."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from crepe_deploy.errors import ConfigError

from .options import calibration_options

if TYPE_CHECKING:
    from crepe_deploy.store.sources import Model
    from crepe_deploy.texts import CalibrationSet

EXIT_RESUMABLE = 75


@click.command("search")
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Preset to write, for prune --preset.")
@calibration_options(samples=16, length=512, required=True)
@click.option("--text", required=True, metavar="FILE_OR_DATASET", help="Text to judge on; never a test split.")
@click.option("--text-field", default="text", show_default=True)
@click.option("--text-samples", type=click.IntRange(1), default=4, show_default=True, help="Windows judged on.")
@click.option("--text-length", type=click.IntRange(2), default=512, show_default=True, help="Tokens in each.")
@click.option("--sparsity", default="2:4", show_default=True, help="N:M (N kept of M) or a fraction of zeros.")
@click.option("--granularity", type=click.Choice(["row", "matrix"]), default="row", show_default=True)
@click.option(
    "--optimizer",
    type=click.Choice(["pho", "hill-climb"]),
    default="pho",
    show_default=True,
    help="pho: proxies filter, KL decides. hill-climb: the slow baseline, perplexity at every step.",
)
@click.option(
    "--proxy",
    default="auto",
    show_default=True,
    help="auto (what ranks best), gini, diagonal-error, sketch-error, token-error, retained-mass, fitted.",
)
@click.option("--evaluations", type=click.IntRange(1), default=None, help="Default: pho 240, hill-climb 60.")
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=None,
    help="Stop optimising in time to be done after so long; a resumed search counts anew.",
)
@click.option("--fit", type=click.IntRange(3), default=16, show_default=True, help="Settings judged to fit proxies.")
@click.option("--finalists", type=click.IntRange(1), default=8, show_default=True, help="Settings judged at the end.")
@click.option("--kernels", default=None, metavar="LIST", help="Window sizes, comma-separated, odd, ascending.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Threads that score candidates.")
@click.option("--include", default=None, metavar="REGEX", help="Prune only tensors whose name matches.")
@click.option("--exclude", default=None, metavar="REGEX", help="Leave tensors whose name matches dense.")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--revision", default=None, help="Branch, tag or commit of a hub model.")
@click.option("--resume", is_flag=True, help="Go on with the journal OUT.journal of a stopped search.")
@click.option("--overwrite", is_flag=True, help="Replace the output and the journal if they exist.")
@click.option("--json", "as_json", is_flag=True, help="Print the preset on stdout, nothing else.")
def search_command(out: Path, as_json: bool, **options: Any) -> None:  # fmt: skip
    """Find CRePE's hyperparameters for MODEL and write them as a preset with its provenance.

    Exit code 75 means stopped: the same command with --resume goes on.
    """
    try:
        document = _search(out=out, **options)
    except KeyboardInterrupt:
        if not out.with_name(out.name + ".journal").is_file():
            raise
        click.echo("stopped; the same command with --resume goes on", err=True)
        raise SystemExit(EXIT_RESUMABLE) from None
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(_lines(out, document)))


def _search(
    *, model: str, out: Path, sparsity: str, granularity: Any, kernels: str | None, revision: str | None,
    resume: bool, overwrite: bool, calib: tuple[str, ...], calib_field: str, calib_samples: int, calib_length: int,
    text: str, text_field: str, text_samples: int, text_length: int, seed: int, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    refuse_test_split(text)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that sleep at barriers
    from crepe_deploy.pattern import parse_pattern
    from crepe_deploy.progress import progress
    from crepe_deploy.searching.run import SearchConfig, search
    from crepe_deploy.searching.space import KERNEL_SIZES
    from crepe_deploy.store.sources import require_pinned, resolve_model

    sizes = KERNEL_SIZES if kernels is None else _sizes(kernels)
    config = SearchConfig(parse_pattern(sparsity, granularity), kernel_sizes=sizes, seed=seed, **options)
    found = resolve_model(model, revision, _say)
    require_pinned(revision, found)
    calibration = _windows(found, calib, calib_field, calib_samples, calib_length, seed)
    judged_on = _windows(found, text, text_field, text_samples, text_length, seed)
    return search(
        found, out, config, calibration, judged_on, resume=resume, overwrite=overwrite, show=progress, say=_say
    )


def refuse_test_split(source: str) -> None:
    """Raise ConfigError for a text whose file name or split says that it is a test split."""
    name = Path(source).name if Path(source).is_file() else source.partition(":")[2]
    if "test" in re.split(r"[^a-z0-9]+", name.lower()):
        raise ConfigError(f"--text {source} is called a test split: search on a validation or training text")


def _windows(
    model: Model, source: str | tuple[str, ...], field: str, samples: int, length: int, seed: int
) -> CalibrationSet:
    from crepe_deploy.model.decoder import load_config
    from crepe_deploy.texts import calibration_windows, load_tokenizer

    context = int(getattr(load_config(model.folder), "max_position_embeddings", length))
    tokenizer = load_tokenizer(model.folder)
    return calibration_windows(source, tokenizer, samples, min(length, context), seed=seed, field=field)


def _sizes(kernels: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in kernels.split(","))
    except ValueError as error:
        raise ConfigError(f"--kernels {kernels} is no list of whole numbers") from error


def _say(message: str) -> None:
    click.echo(message, err=True)


def _lines(out: Path, document: dict[str, Any]) -> list[str]:
    provenance = document["provenance"]
    figures = {"found": provenance["result"], **provenance["anchors"]}
    shown = [f"  {name}: KL {each['kl']:.4f}, perplexity {each['perplexity']:.2f}" for name, each in figures.items()]
    params = " ".join(f"{name}={value}" for name, value in document["params"].items())
    return [
        f"{out}: {document['method']} {params}",
        f"on the search text, after {provenance['evaluations']} evaluations and {provenance['judged']} verdicts "
        f"in {provenance['seconds']} s:",
        *shown,
    ]
