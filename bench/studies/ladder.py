"""Quality by pattern and score on a real model: the N:M ladder.

    python -m crepe_deploy.bench.studies.ladder [--patterns 2:4,16:32] [--out bench/results/ladder.json]

SmolLM2-135M-Instruct (dequantised Q4_1) in bf16, calibrated on 16 x 512 tokens of c4 train, scored on the first
12 x 512 tokens of enwiki valid, KL against the dense model on the same tokens.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from ...pruning.config import FEEDS, prune_config
from ...quality.perplexity import evaluate
from ...store.files import write_json
from ...store.manifest import versions
from ...texts import calibration_windows, load_tokenizer
from ..assets import MODEL_NAME, ensure_assets
from .frame import assets_option, out_option, pruned, publish, say

PATTERNS = ("2:4", "4:8", "8:16", "16:32", "0.5/row", "0.5/matrix")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "RIA, a = 0.5": ("ria", {"exponent": 0.5}),
    "RIA, a = 1.0": ("ria", {"exponent": 1.0}),
    "Wanda": ("wanda", {}),
    "CRePE, preset default": ("crepe", {}),
    "SparseGPT": ("sparsegpt", {}),
}
WINDOW, WINDOWS = 512, 12


def measure(assets_dir: Path, patterns: tuple[str, ...], feed: Any, seed: int, only: str) -> dict[str, Any]:
    """Perplexity and KL of every method at every pattern; one prune and one evaluation each."""
    assets = ensure_assets(assets_dir, enwiki=True)
    tokens = calibration_windows(assets.text("c4", "train"), load_tokenizer(assets.model), 16, 512, seed=seed)
    text = assets.text("enwiki", "valid")
    rows: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {}
    for label, (name, params) in METHODS.items():
        if not re.search(only, label):
            continue
        for pattern in patterns:
            config = prune_config(name, pattern, params=params, feed=feed)
            with pruned(assets.model, config, tokens) as folder:
                limit = WINDOW * WINDOWS
                report = evaluate(folder, text, window=WINDOW, max_tokens=limit, against=assets.model).to_dict()
            paired = report["paired"]
            rows.setdefault(label, {})[pattern] = {
                "perplexity": report["perplexity"],
                "kl_mean": paired["kl_mean"],
                "perplexity_ratio": paired["perplexity_ratio"],
            }
            say(f"{label} {pattern}: perplexity {report['perplexity']['value']:.1f}")
    return {
        "command": f"python -m crepe_deploy.bench.studies.ladder --patterns {','.join(patterns)} --feed {feed}"
        + f" --seed {seed}"
        + (f" --only '{only}'" if only else ""),
        "model": MODEL_NAME,
        "calibration": tokens.record() | {"source": "c4 train"},
        "convention": report["convention"] | {"text": "enwiki valid"},
        "dense_perplexity": report["paired"]["reference_perplexity"],
        "versions": versions(),
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """The perplexities as a Markdown table with their conditions."""
    patterns = list(next(iter(result["rows"].values())))
    convention, calibration = result["convention"], result["calibration"]
    lines = [
        f"{result['model']}, {convention['dtype']}; calibrated on {calibration['samples']} x {calibration['length']} "
        f"tokens of {calibration['source']}, seed {calibration['seed']}; perplexity on the first "
        f"{convention['windows']} x {convention['window']} tokens of {convention['text']}, "
        f"dense {result['dense_perplexity']['value']:.2f}. `{result['command']}`",
        "",
        "| perplexity (lower is better) | " + " | ".join(patterns) + " |",
        "|---" * (len(patterns) + 1) + "|",
    ]
    for label, cells in result["rows"].items():
        values = " | ".join(f"{cells[pattern]['perplexity']['value']:.1f}" for pattern in patterns)
        lines.append(f"| {label} | {values} |")
    return "\n".join(lines) + "\n"


@click.command()
@out_option()
@click.option("--markdown", "markdown_path", type=click.Path(path_type=Path), default=None)
@assets_option
@click.option("--patterns", default=",".join(PATTERNS), show_default=True)
@click.option("--only", default="", metavar="REGEX", help="Measure only the rows whose label matches.")
@click.option("--feed", type=click.Choice(FEEDS), default="auto", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    out: Path | None, markdown_path: Path | None, assets_dir: Path, patterns: str, feed: str, seed: int, only: str
) -> None:
    """Measure the ladder and print it."""
    result = measure(assets_dir, tuple(patterns.split(",")), feed, seed, only)
    publish(markdown(result), markdown_path)
    if out is not None:
        write_json(out, result)


if __name__ == "__main__":
    main()
