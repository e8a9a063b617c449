"""Builds what configs/bench-smollm2.yaml measures.

    python -m crepe_deploy.bench.studies.smollm2 --folder out/bench/smollm2

SmolLM2-135M-Instruct, dequantised Q4_1, pruned with 16 x 512 calibration tokens of c4 by the commands a user would
type. What is there already is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import click

from ...errors import ConfigError, CrepeError
from ..assets import ensure_assets
from ..run.processes import crepe_deploy
from .frame import CALIBRATION, assets_option, folder_option, say

RUNS: Final = (("ria", "2:4", "dense"), ("crepe", "2:4", "dense,packed"), ("crepe", "16:32", "dense,packed"))


def build(root: Path, assets_dir: Path, only: str | None = None) -> list[Path]:
    """Prune and export what is missing below `root`, or only the folder of this name; returns what was made."""
    assets = ensure_assets(assets_dir)
    commands: dict[str, tuple[str, ...]] = {
        f"{method}-{pattern.replace(':', 'of')}": (
            "prune-and-export", str(assets.model), "--method", method, "--sparsity", pattern,
            "--calib", str(assets.text("c4", "train")), *CALIBRATION, "--format", formats,
        )
        for method, pattern, formats in RUNS
    }  # fmt: skip
    commands["int8"] = ("export", str(assets.model), "--format", "int8")
    if only is not None and only not in commands:
        raise ConfigError(f"--only {only}: there are {', '.join(commands)}")
    wanted = [name for name in commands if only in (None, name) and not (root / name).is_dir()]
    for name in wanted:
        crepe_deploy(*commands[name], "--out", str(root / name))
    return [root / name for name in wanted]


@click.command()
@folder_option("out/bench/smollm2")
@assets_option
@click.option("--only", default=None, help="One of the folders, such as crepe-2of4.")
def main(folder: Path, assets_dir: Path, only: str | None) -> None:
    """Build the folders and print what was made."""
    try:
        for made in build(folder, assets_dir, only):
            click.echo(made)
    except CrepeError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
