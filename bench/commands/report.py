"""`crepe-deploy report`: parse options, then one function."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import click

from ...commands.options import Count, Number
from ...option_groups import Argument, Grouped

EXAMPLES: Final = """\b
Examples:
  crepe-deploy report run.json --out report
  crepe-deploy report runs/monday.json runs/tuesday.json --out report --overwrite --max-perplexity-ratio 1.05
"""


@click.command("report", cls=Grouped, epilog=EXAMPLES)
@click.argument(
    "runs", cls=Argument, nargs=-1, required=True, type=click.Path(path_type=Path), help="Files that bench wrote."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; it appears whole or not.")
@click.option("--overwrite", is_flag=True, help="Replace OUT where it holds an earlier report and nothing else.")
@click.option(
    "--max-perplexity-ratio",
    default=1.10,
    show_default=True,
    type=Number(1.0),
    help="Quality limit of the answer: candidates above this multiple of the baseline's perplexity are out.",
)
@click.option(
    "--context",
    default=4096,
    show_default=True,
    type=Count(1),
    help="KV-cache tokens in the memory stack.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
def report_command(
    runs: tuple[Path, ...], out: Path, overwrite: bool, max_perplexity_ratio: float, context: int, as_json: bool
) -> None:
    """Show RUNS (files that `crepe-deploy bench` wrote) as one offline page, PNG figures and Markdown.

    Runs of one scenario on one machine become a history; others get chapters of their own.
    """
    from ..report.write import make_report

    result = make_report(
        runs, out, max_perplexity_ratio=max_perplexity_ratio, context_tokens=context, overwrite=overwrite
    )
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    for chapter in result["chapters"]:
        click.echo(f"{chapter['scenario']}: should I prune, quantise, or both? {chapter['headline']}")
        for reason in chapter["reasons"]:
            click.echo(f"  {reason}")
    click.echo(f"{result['report']} ({len(result['files'])} files)")
