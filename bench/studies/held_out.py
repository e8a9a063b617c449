"""How far a reconstruction carries to text that it was not calibrated on: which damping and which penalty are shipped.

    python -m crepe_deploy.bench.studies.held_out [--out bench/results/held_out.json]

SmolLM2-135M-Instruct (dequantised Q4_1), windows of 512 tokens of c4 train. The inputs of three layers in three blocks
of the dense model are summed over the first 16, 64 and 128 windows and, apart from these, over 32 more. Each row
prunes to 2:4 by RIA and reconstructs on the first sums; its error is ||X (W - W')^T||^2 / ||X W^T||^2 on the 32. The
figure of a row is the geometric mean over the nine layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from ...model.calibrate import bf16_products
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

PATTERN = NM(2, 4)
LAYERS = [f"model.layers.{block}.{path}" for block in (4, 14, 24)
          for path in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
SAMPLES, HELD_OUT, LENGTH, BATCH = (16, 64, 128), 32, 512, 4
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1)
ROWS = {
    "none": (None, SAMPLES),
    **{f"exact, damping {damping:g}": (f"exact:damping={damping:g}", SAMPLES) for damping in DAMPINGS},
    **{
        f"admm, penalty {penalty:g}, steps {steps}": (f"admm:penalty={penalty:g},steps={steps}", SAMPLES[-1:])
        for penalty, steps in ((0.03, 20), (0.1, 20), (0.3, 20), (0.6, 20), (1, 20), (0.3, 40))
    },
}


@torch.inference_mode()
def gram_matrices(model: nn.Module, tokens: Tensor, layers: Sequence[str]) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The sums X^T X (in, in) fp32 of the layers' inputs after each micro-batch of tokens (samples, length)."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2)
            with bf16_products(rows.dtype == torch.bfloat16):
                sums[name] = sums.get(name, torch.zeros(rows.shape[1], rows.shape[1])) + rows.float().T @ rows.float()

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    try:
        for start in range(0, len(tokens), BATCH):
            model(tokens[start : start + BATCH], use_cache=False, logits_to_keep=1)
            yield start + BATCH, sums
    finally:
        for handle in handles:
            handle.remove()


def held_out_error(weight: Tensor, gram: Tensor, samples: int, held: Tensor, step: str | None) -> float:
    """The error of weight (out, in) fp32 on `held` (in, in) when pruned and reconstructed on `gram` of `samples`."""
    stats = Stats(hessian=gram * (2 / samples), col_norm=(gram.diagonal() / samples).sqrt())
    mask = select(RIA().score(weight, stats), PATTERN)
    pruned = weight * mask
    if step is not None:
        pruned = build_step("reconstruct", step)(weight, weight, mask, stats, PATTERN).weight
    change = weight - pruned
    return float(((change @ held) * change).sum() / ((weight @ held) * weight).sum())


def measure(assets_dir: Path, say: Any) -> dict[str, Any]:
    """Every row's figure by the number of windows that it was calibrated on."""
    assets = ensure_assets(assets_dir)
    wanted = SAMPLES[-1] + HELD_OUT
    tokens = calibration_windows(
        assets.text("c4", "train"), load_tokenizer(assets.model), wanted, LENGTH, seed=0
    ).tokens
    model = load_model(assets.model)
    grams = {done: dict(sums) for done, sums in gram_matrices(model, tokens[: SAMPLES[-1]], LAYERS) if done in SAMPLES}
    *_, (_, held) = gram_matrices(model, tokens[SAMPLES[-1] :], LAYERS)
    say("the layers' inputs are summed")
    rows: dict[str, dict[str, float]] = {}
    for label, (step, sizes) in ROWS.items():
        rows[label] = {}
        for samples in sizes:
            errors = [
                held_out_error(
                    model.get_submodule(name).weight.detach().float(), grams[samples][name], samples, held[name], step
                )
                for name in LAYERS
            ]
            rows[label][str(samples)] = math.exp(sum(map(math.log, errors)) / len(errors))
        say(f"{label}: {json.dumps(rows[label])}")
    return {
        "command": "python -m crepe_deploy.bench.studies.held_out",
        "model": MODEL_NAME,
        "layers": LAYERS,
        "versions": versions(),
        "error_on_held_out_windows": rows,
    }


@click.command()
@out_option("bench/results/held_out.json")
@assets_option
def main(out: Path, assets_dir: Path) -> None:
    """Measure all rows and write them."""
    write_json(out, measure(assets_dir, say))


if __name__ == "__main__":
    main()
