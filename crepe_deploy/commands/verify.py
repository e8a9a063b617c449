"""The command `verify`."""

from __future__ import annotations

from pathlib import Path

import click

from crepe_deploy.option_groups import Argument, Grouped

from .options import json_option, print_result

EXAMPLES = """\b
Examples:
  crepe-deploy verify out/dense
  crepe-deploy verify out/packed --json
"""


@click.command("verify", cls=Grouped, epilog=EXAMPLES)
@click.argument(
    "folder",
    cls=Argument,
    type=click.Path(path_type=Path),
    help="A folder that crepe-deploy wrote.",
)
@json_option
def verify_command(folder: Path, as_json: bool) -> None:
    """Compare every file of FOLDER with its manifest; exit 1 naming the file that differs.

    After structural pruning every tensor's shape is compared with config.json too. The tokenizer is loaded.
    """
    from crepe_deploy.api.verify import verify

    manifest = verify(folder)
    summary = {"folder": str(folder), "files": len(manifest.files), "verified": True}
    print_result(summary, as_json, [f"{folder}: {len(manifest.files)} files match the manifest"])
