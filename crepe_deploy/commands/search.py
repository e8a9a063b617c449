"""The command `search`, and the lines that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from crepe_deploy.errors import ConfigError
from crepe_deploy.option_groups import Grouped

from .options import (
    Count,
    Number,
    calibration_options,
    device_option,
    dtype_option,
    model_argument,
    prepare_libraries,
    print_result,
    resumable,
    revision_option,
    say,
    seed_option,
    sparsity_options,
    text_field_option,
)

EXAMPLES = """\b
Examples:
  crepe-deploy search models/llama --calib wiki.txt --text wiki.valid.txt --out mine.json
  crepe-deploy search models/llama --sparsity 16:32 --minutes 30 --calib c4.txt --text wiki.valid.txt --out mine.json
  crepe-deploy search models/llama --calib wiki.txt --text wiki.valid.txt --out mine.json --resume
"""


@click.command("search", cls=Grouped, epilog=EXAMPLES)
@model_argument
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Preset to write, for prune --preset.")
@calibration_options(samples=16, length=512, required=True)
@click.option(
    "--text",
    required=True,
    metavar="FILE_OR_DATASET",
    help="To judge on: .txt, .jsonl, .parquet or a datasets name; never a test split.",
)
@text_field_option
@click.option("--text-samples", type=Count(1), default=4, show_default=True, help="Windows judged on.")
@click.option("--text-length", type=Count(2), default=512, show_default=True, help="Tokens in each.")
@sparsity_options
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
@click.option("--evaluations", type=Count(1), default=None, help="Default: pho 240, hill-climb 60.")
@click.option(
    "--minutes",
    type=Number(0, min_open=True),
    default=None,
    help="Stop optimising in time to be done after so long; a resumed search counts anew.",
)
@click.option("--fit", type=Count(3), default=16, show_default=True, help="Settings judged to fit proxies.")
@click.option("--finalists", type=Count(1), default=8, show_default=True, help="Settings judged at the end.")
@click.option("--kernels", default=None, metavar="LIST", help="Window sizes, comma-separated, odd, ascending.")
@seed_option
@click.option("--workers", type=Count(1), default=2, show_default=True, help="Threads that score candidates.")
@click.option("--include", default=None, metavar="REGEX", help="Prune only tensors whose name matches.")
@click.option("--exclude", default=None, metavar="REGEX", help="Leave tensors whose name matches dense.")
@dtype_option
@device_option
@revision_option
@click.option("--resume", is_flag=True, help="Go on with the journal OUT.journal of a stopped search.")
@click.option("--overwrite", is_flag=True, help="Replace the preset and the journal if they exist.")
@click.option("--json", "as_json", is_flag=True, help="Print the preset as one JSON document on stdout, nothing else.")
def search_command(out: Path, calib: tuple[str, ...], kernels: str | None, as_json: bool, **options: Any) -> None:
    """Find CRePE's hyperparameters for MODEL and write them as a preset with its provenance.

    Exit code 75 means stopped: the same command with --resume goes on.
    """
    prepare_libraries()
    from crepe_deploy.api.inputs import Mixture
    from crepe_deploy.api.search import search
    from crepe_deploy.progress import progress
    from crepe_deploy.searching.run import journal_path

    if kernels is not None:
        options["kernels"] = _sizes(kernels)
    with resumable(journal_path(out)):
        document = search(out=out, calib=Mixture(calib), show=progress, say=say, **options)
    print_result(document, as_json, lines(out, document))


def _sizes(kernels: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in kernels.split(","))
    except ValueError as error:
        raise ConfigError(f"--kernels {kernels} is no list of whole numbers") from error


def lines(out: Path, document: dict[str, Any]) -> list[str]:
    """The preset and what it was worth, for a reader at a terminal."""
    provenance = document["provenance"]
    figures = {"found": provenance["result"], **provenance["anchors"]}
    shown = [
        f"  {name}: KL {judged['kl']:.4f}, perplexity {judged['perplexity']:.2f}" for name, judged in figures.items()
    ]
    params = " ".join(f"{name}={value}" for name, value in document["params"].items())
    return [
        f"{out}: {document['method']} {params}",
        f"on the search text, after {provenance['evaluations']} evaluations and {provenance['judged']} judged settings "
        f"in {provenance['seconds']} s (lower is better):",
        *shown,
    ]
