"""Which rule damps a Gram matrix best: the error of every layer on text that it was not fitted to.

    python -m crepe_deploy.bench.studies.damping [--out bench/results/damping.json]

SmolLM2-135M-Instruct (dequantised Q4_1), all linear layers of a few dense blocks, windows of 512 tokens of c4 train: 16
to fit to, 16 others held out. Each row prunes by RIA, then runs ADMM as the recipe does, with one rule and fraction;
the error of a layer is ||X (W - W')^T||^2 / ||X W^T||^2 on the held-out windows. `planted` is a matrix of random
weights whose inputs have a few channels 30 and 100 times as large as the others.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import click
import torch
from torch import Tensor

from ...model.stats import Stats
from ...pattern import NM
from ...pruning.methods.ria import RIA
from ...pruning.steps import build_step
from ...quality.perplexity import load_model
from ...select import select
from ...store.files import write_json
from ...store.manifest import versions
from ...texts import calibration_windows, load_tokenizer
from ..assets import MODEL_NAME, ensure_assets
from .frame import assets_option, out_option, say
from .held_out import gram_matrices

BLOCKS: Final = (0, 1, 10, 20, 28, 29)
PATHS: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                "mlp.up_proj", "mlp.down_proj")  # fmt: skip
PATTERNS: Final = (NM(2, 4), NM(16, 32))
SAMPLES, LENGTH = 16, 512
RULES: Final = (("mean", 0.1), ("mean", 0.01), ("geometric", 0.1), ("geometric", 0.03))
PLANTED: Final = 512


def planted() -> tuple[Tensor, Tensor, Tensor]:
    """A weight (256, PLANTED), and inputs (tokens, PLANTED) with outlier channels: to fit to, and held out."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(PLANTED, PLANTED, generator=draw) / PLANTED**0.5
    sizes = torch.ones(PLANTED)
    sizes[torch.randperm(PLANTED, generator=draw)[:8]] = torch.tensor([30.0] * 6 + [100.0] * 2)
    inputs = torch.randn(2 * 4096, PLANTED, generator=draw) @ mixing * sizes
    return torch.randn(256, PLANTED, generator=draw), inputs[:4096], inputs[4096:]


def held_out_errors(weight: Tensor, gram: Tensor, held: Tensor, pattern: NM) -> dict[str, float]:
    """By rule and fraction, the error of weight (out, in) fp32 on `held` when pruned and fitted on `gram` (in, in)."""
    found = {}
    for rule, fraction in RULES:
        stats = Stats(hessian=gram * (2 / SAMPLES), col_norm=(gram.diagonal() / SAMPLES).sqrt())
        mask = select(RIA().score(weight, stats), pattern)
        step = build_step("reconstruct", f"admm:damping={fraction},damping_rule={rule}")
        change = weight - step(weight, weight, mask, stats, pattern).weight
        found[label(rule, fraction)] = float(((change @ held) * change).sum() / ((weight @ held) * weight).sum())
    return found


def label(rule: str, fraction: float) -> str:
    """Of a row."""
    return f"{rule} {fraction:g}"


def measure(assets_dir: Path, blocks: tuple[int, ...]) -> dict[str, Any]:
    """Every layer's errors by pattern, and their geometric means."""
    assets = ensure_assets(assets_dir)
    tokens = calibration_windows(
        assets.text("c4", "train"), load_tokenizer(assets.model), 2 * SAMPLES, LENGTH, seed=0
    ).tokens
    model = load_model(assets.model)
    layers = [f"model.layers.{block}.{path}" for block in blocks for path in PATHS]
    *_, (_, fitted) = gram_matrices(model, tokens[:SAMPLES], layers)
    *_, (_, held) = gram_matrices(model, tokens[SAMPLES:], layers)
    errors: dict[str, dict[str, dict[str, float]]] = {}
    weight, here, there = planted()
    for pattern in PATTERNS:
        rows = errors[str(pattern)] = {"planted": held_out_errors(weight, here.T @ here, there.T @ there, pattern)}
        for name in layers:
            dense = model.get_submodule(name).weight.detach().float()
            rows[name] = held_out_errors(dense, fitted[name], held[name], pattern)
            say(f"{pattern} {name}: " + ", ".join(f"{rule} {error:.5f}" for rule, error in rows[name].items()))
    return {
        "command": "python -m crepe_deploy.bench.studies.damping",
        "model": MODEL_NAME,
        "text": {"fitted": f"c4 train, {SAMPLES} x {LENGTH} tokens", "held_out": f"{SAMPLES} other windows of it"},
        "versions": versions(),
        "mean": {pattern: summary(rows) for pattern, rows in errors.items()},
        "error_on_held_out_windows": errors,
    }


def summary(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The geometric mean of each rule's errors over the model's layers, and over those of one kind."""
    names = [name for name in rows if name != "planted"]
    kinds = {"all": names} | {path: [name for name in names if name.endswith(path)] for path in PATHS}
    return {
        kind: {
            label(*rule): math.exp(sum(math.log(rows[name][label(*rule)]) for name in members) / len(members))
            for rule in RULES
        }
        for kind, members in kinds.items()
    }


@click.command()
@click.option("--blocks", default=",".join(map(str, BLOCKS)), show_default=True)
@out_option("bench/results/damping.json")
@assets_option
def main(blocks: str, out: Path, assets_dir: Path) -> None:
    """Measure all rows and write them."""
    write_json(out, measure(assets_dir, tuple(map(int, blocks.split(",")))))


if __name__ == "__main__":
    main()
