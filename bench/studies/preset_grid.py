"""How the shipped CRePE preset was chosen: a few settings, several calibration seeds, two texts kept from testing.

    python -m crepe_deploy.bench.studies.preset_grid [--seeds 0,1,2,3] [--out bench/results/preset_grid.json]

SmolLM2-135M-Instruct (dequantised Q4_1), 2:4, 16 x 512 calibration tokens of c4 train, 16 x 512 tokens each of wiki
valid and c4 valid. A cell is the geometric mean of the two perplexities, compared with RIA's at the same seed.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import click

from ...pruning.config import prune_config
from ...quality.perplexity import evaluate
from ...store.manifest import versions
from ...texts import CalibrationSet, calibration_windows, load_tokenizer
from ..assets import MODEL_NAME, Assets, ensure_assets
from .frame import assets_option, out_option, pruned, save, say

BASE = "RIA, a = 0.5"
SETTINGS: dict[str, dict[str, Any]] = {
    BASE: {"gamma": 0, "exponent": 0.5},
    "RIA, a = 0.75": {"gamma": 0, "exponent": 0.75},
    "RIA, a = 1": {"gamma": 0, "exponent": 1.0},
    "smooth, gamma 0.1, k 7, a = 0.75": {"gamma": 0.1, "kernel_size": 7, "exponent": 0.75, "neighbourhood": "smooth"},
    "smooth, gamma 0.1, k 7, a = 1": {"gamma": 0.1, "kernel_size": 7, "exponent": 1.0, "neighbourhood": "smooth"},
    "ratio, gamma 0.1, k 3, a = 0.75": {"gamma": 0.1, "kernel_size": 3, "exponent": 0.75, "neighbourhood": "ratio"},
}


def perplexity(assets: Assets, params: dict[str, Any], tokens: CalibrationSet) -> float:
    """Geometric mean of the perplexities on the two validation texts after pruning to 2:4 with `params`."""
    config = prune_config("crepe", "2:4", preset="ria", params=params)
    with pruned(assets.model, config, tokens) as folder:
        texts = [assets.text(name, "valid") for name in ("wiki", "c4")]
        values = [evaluate(folder, text, window=512, max_tokens=8192).perplexity.value for text in texts]
    return math.sqrt(values[0] * values[1])


def measure(assets_dir: Path, seeds: list[int]) -> dict[str, Any]:
    """Every setting at every seed; ratios to RIA at the same seed, and their geometric mean."""
    assets = ensure_assets(assets_dir)
    tokenizer = load_tokenizer(assets.model)
    cells: dict[str, list[float]] = {label: [] for label in SETTINGS}
    for seed in seeds:
        tokens = calibration_windows(assets.text("c4", "train"), tokenizer, 16, 512, seed=seed)
        for label, params in SETTINGS.items():
            cells[label].append(perplexity(assets, params, tokens))
            say(f"seed {seed}, {label}: {cells[label][-1]:.1f}")
    logs = {
        label: [math.log(value / base) for value, base in zip(values, cells[BASE], strict=True)]
        for label, values in cells.items()
    }
    return {
        "command": f"python -m crepe_deploy.bench.studies.preset_grid --seeds {','.join(map(str, seeds))}",
        "model": MODEL_NAME,
        "versions": versions(),
        "seeds": seeds,
        "perplexity": cells,
        "ratio_to_ria": {label: math.exp(statistics.fmean(values)) for label, values in logs.items()},
    }


@click.command()
@click.option("--seeds", default="0,1,2,3", show_default=True)
@out_option()
@assets_option
def main(seeds: str, out: Path | None, assets_dir: Path) -> None:
    """Measure the grid and print the ratios."""
    result = measure(assets_dir, [int(seed) for seed in seeds.split(",")])
    save(result, out, result["ratio_to_ria"])


if __name__ == "__main__":
    main()
