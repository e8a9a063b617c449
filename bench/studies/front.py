"""README's picture: perplexity over dense of one small model, from the committed results.

python -m crepe_deploy.bench.studies.front [--out docs/figures/front.png]
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from ...store.reading import read_object
from ..run.result import load_run
from .quality_table import rows_of

ROWS = (
    ("2:4, RIA", "RIA, 256 windows", "2:4"),
    ("2:4, recipe best", "recipe best, 256 windows", "2:4"),
    ("16:32, RIA", "RIA, 128 windows", "16:32"),
    ("16:32, recipe best, not rescaled", "RIA + fold + admm, 128 windows", "16:32"),
)


def bars(results: Path) -> list[tuple[str, float]]:
    """(label, perplexity over dense) on wiki test; int8 is of the speed run, which read more of the same text."""
    grid = read_object(results / "quality.json")
    dense = float(np.mean(grid["dense"]["wiki"]))
    pruned = [
        (label, float(np.exp(rows_of(grid, pattern, "wiki")[row].mean() - dense))) for label, row, pattern in ROWS
    ]
    value = {c.name: c.quality.perplexity.value for c in load_run(results / "smollm2.json").candidates if c.quality}
    return [*pruned, ("int8, not pruned", value["int8"] / value["dense"]), ("dense", 1.0)]


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=Path("bench/results"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/figures/front.png"), show_default=True)
def main(results: Path, out: Path) -> None:
    """Draw the bars."""
    from matplotlib.figure import Figure

    rows = bars(results)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.barh([label for label, _ in rows], [value for _, value in rows], color="#4a6fa5")
    axes.bar_label(drawn, [f"{value:.2f}" for _, value in rows], padding=3)
    axes.set_xlim(0, 1.1 * max(value for _, value in rows))
    axes.set_xlabel("perplexity over dense, wiki test (lower is better; 1 is no loss)")
    axes.set_title("SmolLM2-135M-Instruct, half of the blocks' weights removed, no training", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(str(out), dpi=110)


if __name__ == "__main__":
    main()
