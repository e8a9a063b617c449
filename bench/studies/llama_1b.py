"""Builds what configs/bench-llama-1b.yaml measures, below out/bench/llama-1b.

    python -m crepe_deploy.bench.studies.llama_1b

A random bf16 checkpoint of Llama-3.2-1B's shape, pruned by magnitude, and its packed exports: speed does not depend on
values. Its head is dense in every candidate, so a decode step at batch 1 cannot gain more than the bytes that a dense
step reads over those of a packed one (`step_bytes` in the run's notes).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from ...progress import progress


def build(root: Path, patterns: Sequence[str]) -> list[Path]:
    """The dense folder with the first pattern's zeros, then the packed ones; what is there already is kept."""
    from ...exporting.pipeline import export_checkpoint
    from ...pruning.config import prune_config
    from ...pruning.prune import prune
    from ...store.sources import resolve_model
    from .pruning import make_llama_1b

    model = root / "model"
    folders: list[Path] = []
    for pattern in patterns:
        slug = pattern.replace(":", "of")
        pruned, packed = root / f"dense-{slug}", root / f"packed-{slug}"
        if not packed.is_dir() or not folders:
            if not (model / "config.json").is_file():
                model.mkdir(parents=True, exist_ok=True)
                make_llama_1b(model)
            if not pruned.is_dir():
                with progress(f"pruning to {pattern}") as step:
                    prune(
                        resolve_model(str(model)), pruned, prune_config("magnitude", pattern), None,
                        step=step,
                    )  # fmt: skip
            if not packed.is_dir():
                export_checkpoint(pruned, packed, "packed")
        folders += [pruned, packed] if not folders else [packed]
    return folders


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("out/bench/llama-1b"), show_default=True)
@click.option("--patterns", default="2:4,16:32", show_default=True)
def main(folder: Path, patterns: str) -> None:
    """Build the folders and print them."""
    for built in build(folder, patterns.split(",")):
        click.echo(built)


if __name__ == "__main__":
    main()
