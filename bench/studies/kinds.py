"""Whether CRePE gains by coefficients of their own for each kind of layer, against one setting for all.

    python -m crepe_deploy.bench.studies.kinds [--seeds 0,1] [--out bench/results/kinds.json]

SmolLM2-135M-Instruct (dequantised Q4_1), 2:4, 16 x 512 calibration tokens of c4 train. `search --optimizer kinds`
judges on 4 further windows of the same text; no perplexity is looked at until it is done. Then each row is pruned and
judged on 16 x 512 tokens each of wiki valid and c4 valid.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click

from ...pattern import NM
from ...pruning.config import PruneConfig, prune_config
from ...quality.perplexity import evaluate
from ...searching.run import SearchConfig, search
from ...store.manifest import versions
from ...store.sources import resolve_model
from ...texts import CalibrationSet, calibration_windows, load_tokenizer
from ..assets import MODEL_NAME, Assets, ensure_assets
from .frame import assets_option, out_option, pruned, save, say

PATTERN: Final = NM(2, 4)
SAMPLES, HELD_OUT, LENGTH = 16, 4, 512
ONE_FOR_ALL: Final = {
    "RIA, a = 0.75": prune_config("ria", PATTERN, params={"exponent": 0.75}),
    "RIA, a = 1": prune_config("ria", PATTERN, params={"exponent": 1.0}),
    "Wanda": prune_config("wanda", PATTERN),
    "preset default": prune_config("crepe", PATTERN),
}


def perplexities(assets: Assets, config: PruneConfig, calibration: CalibrationSet) -> dict[str, float]:
    """On both texts, and their geometric mean."""
    with pruned(assets.model, config, calibration) as folder:
        values = {
            name: evaluate(folder, assets.text(name, "valid"), window=512, max_tokens=8192).perplexity.value
            for name in ("wiki", "c4")
        }
    return values | {"both": math.sqrt(values["wiki"] * values["c4"])}


def measure(assets: Assets, seed: int) -> dict[str, Any]:
    """What the search finds with one calibration seed, and every row's perplexities."""
    windows = calibration_windows(
        assets.text("c4", "train"), load_tokenizer(assets.model), SAMPLES + HELD_OUT, LENGTH, seed=seed
    )
    calibration, held = (replace(windows, tokens=part) for part in (windows.tokens[:SAMPLES], windows.tokens[SAMPLES:]))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kinds.json"
        config = SearchConfig(PATTERN, optimizer="kinds", seed=seed)
        found = search(resolve_model(str(assets.model)), out, config, calibration, held, say=say)
        rows = {"by kind": prune_config(pattern=PATTERN, preset=out), **ONE_FOR_ALL}
    judged = {}
    for label, row in rows.items():
        judged[label] = perplexities(assets, row, calibration)
        say(f"seed {seed}, {label}: {judged[label]}")
    facts = found["provenance"]
    return {
        "found": {"params": found["params"], "kinds": found.get("kinds", {})},
        "passes": facts["judged"],
        "kl": {"by kind": facts["result"]["kl"]} | {name: one["kl"] for name, one in facts["anchors"].items()},
        "perplexity": judged,
    }


@click.command()
@click.option("--seeds", default="0,1", show_default=True)
@out_option("bench/results/kinds.json")
@assets_option
def main(seeds: str, out: Path, assets_dir: Path) -> None:
    """Measure every seed and write what it gave."""
    assets = ensure_assets(assets_dir)
    measured = {seed: measure(assets, int(seed)) for seed in seeds.split(",")}
    result = {
        "command": f"python -m crepe_deploy.bench.studies.kinds --seeds {seeds}",
        "model": MODEL_NAME,
        "versions": versions(),
        "seeds": measured,
    }
    save(result, out, {seed: one["perplexity"] for seed, one in measured.items()})


if __name__ == "__main__":
    main()
