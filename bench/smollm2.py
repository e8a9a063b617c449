"""Builds what configs/bench-smollm2.yaml measures: `python -m crepe_deploy.bench.smollm2 --folder out/bench/smollm2`.

SmolLM2-135M-Instruct, dequantised Q4_1, pruned with 16 x 512 calibration tokens of c4 by the commands a user would
type. What is there already is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from .assets import DEFAULT_DIR, ensure_assets
from .processes import crepe_deploy

RUNS: Final = (("ria", "2:4", "dense"), ("crepe", "2:4", "dense,packed"), ("crepe", "16:32", "dense,packed"))
CALIBRATION: Final = ("--calib-samples", "16", "--calib-length", "512", "--seed", "0")


def build(root: Path, assets_dir: Path) -> list[Path]:
    """Prune and export what is missing below `root`; returns the folders made."""
    assets = ensure_assets(assets_dir)
    made = []
    for method, pattern, formats in RUNS:
        folder = root / f"{method}-{pattern.replace(':', 'of')}"
        if not folder.is_dir():
            crepe_deploy(
                "prune-and-export", str(assets.model), "--out", str(folder), "--method", method, "--sparsity", pattern,
                "--calib", str(assets.text("c4", "train")), *CALIBRATION, "--format", formats,
            )  # fmt: skip
            made.append(folder)
    int8 = root / "int8"
    if not int8.is_dir():
        crepe_deploy("export", str(assets.model), "--out", str(int8), "--format", "int8")
        made.append(int8)
    return made


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("out/bench/smollm2"), show_default=True)
@click.option("--assets", "assets_dir", type=click.Path(path_type=Path), default=DEFAULT_DIR, show_default=True)
def main(folder: Path, assets_dir: Path) -> None:
    """Build the folders and print what was made."""
    for made in build(folder, assets_dir):
        click.echo(made)


if __name__ == "__main__":
    main()
