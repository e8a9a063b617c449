"""The search on a real model: what it finds, what it costs, and how that does on a text it never saw.

    python -m crepe_deploy.bench.studies.search [--optimizer pho|hill-climb] [--seed 0] [--out FILE]
    python -m crepe_deploy.bench.studies.search --preset found.json     compare what `crepe-deploy search` wrote

SmolLM2-135M-Instruct (dequantised Q4_1), 2:4, calibrated on 16 x 512 tokens of c4 train, searched on 4 x 512 tokens of
c4 valid. The found preset and the anchors are then compared, paired by window, on 12 x 512 tokens of wiki valid.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from ...model.decoder import Decoder
from ...pattern import NM
from ...pruning.recipe import load_preset
from ...pruning.targets import choose_targets
from ...quality.scoring import Estimate, estimate, exp_mean, mean
from ...searching.losses import Losses, MaskedModel
from ...searching.run import SearchConfig, search
from ...searching.space import Setting, anchors
from ...searching.statistics import SampleRule, collect
from ...store.manifest import versions
from ...store.sources import resolve_model
from ...texts import CalibrationSet, calibration_windows, load_tokenizer
from ..assets import MODEL_NAME, Assets, ensure_assets
from .frame import assets_option, out_option, save, say

PATTERN = NM(2, 4)
BASE = "RIA, a = 0.5"
HELD_OUT_SAMPLES = 12


def find(assets: Assets, config: SearchConfig, calibration: CalibrationSet, text: CalibrationSet) -> dict[str, Any]:
    """Run one search and return its preset's document."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"{config.optimizer}.json"
        document = search(resolve_model(str(assets.model)), out, config, calibration, text, say=say)
        load_preset(str(out))
    return document


def compare(
    assets: Assets, settings: dict[str, Setting], calibration: CalibrationSet, text: CalibrationSet
) -> dict[str, Any]:
    """KL and perplexity of every setting on `text`, and both against `BASE`, paired by window."""
    decoder = Decoder(assets.model)
    targets = choose_targets(decoder, PATTERN, None, None)
    with tempfile.TemporaryDirectory() as folder:
        layers = collect(decoder, targets, calibration.tokens, SampleRule(reach=0), Path(folder))
        masked = MaskedModel(decoder, targets, PATTERN, text.tokens, {layer.key: layer.col_norm for layer in layers})
        losses = dict(zip(settings, masked(list(settings.values())), strict=True))
    return {name: _figures(own, losses[BASE]) for name, own in losses.items()}


def _figures(losses: Losses, base: Losses) -> dict[str, Any]:
    nll = [left - right for left, right in zip(losses.nll, base.nll, strict=True)]
    kl = [left - right for left, right in zip(losses.kl, base.kl, strict=True)]
    return {
        "perplexity": math.exp(losses.mean_nll),
        "kl": losses.mean_kl,
        f"perplexity over {BASE}": vars(_by_window(nll, ratio=True)),
        f"kl minus {BASE}": vars(_by_window(kl, ratio=False)),
    }


def _by_window(values: list[float], *, ratio: bool) -> Estimate:
    return estimate([torch.tensor([value]) for value in values], exp_mean if ratio else mean)


def measure(assets_dir: Path, optimizer: Any, seed: int, evaluations: int | None, made: Path | None) -> dict[str, Any]:
    """Search, unless `made` is a preset already, and compare it with the anchors on the held-out text."""
    assets = ensure_assets(assets_dir)
    tokenizer = load_tokenizer(assets.model)
    calibration = calibration_windows(assets.text("c4", "train"), tokenizer, 16, 512, seed=seed)
    text = calibration_windows(assets.text("c4", "valid"), tokenizer, 4, 512, seed=seed)
    held_out = calibration_windows(assets.text("wiki", "valid"), tokenizer, HELD_OUT_SAMPLES, 512, seed=0)
    if made is not None:
        preset = load_preset(made).model_dump()
    else:
        config = SearchConfig(PATTERN, optimizer, evaluations=evaluations, seed=seed)
        preset = find(assets, config, calibration, text)
    settings = {"found": Setting(preset["method"], preset["params"]), **anchors()}
    return {
        "model": MODEL_NAME,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "preset": preset,
        "held_out": {"text": held_out.record(), "settings": compare(assets, settings, calibration, held_out)},
    }


@click.command()
@click.option("--optimizer", type=click.Choice(["pho", "hill-climb"]), default="pho", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--evaluations", type=int, default=None, help="Of the optimiser.")
@click.option("--preset", type=click.Path(path_type=Path), default=None, help="Compare this one; no search.")
@out_option()
@assets_option
def main(
    optimizer: str, seed: int, evaluations: int | None, preset: Path | None, out: Path | None, assets_dir: Path
) -> None:
    """Search, compare, print the comparison."""
    options = f"--optimizer {optimizer} --seed {seed}"
    options += "" if evaluations is None else f" --evaluations {evaluations}"
    options = options if preset is None else f"--preset {preset.name} --seed {seed}"
    result: dict[str, Any] = {"command": f"python -m crepe_deploy.bench.studies.search {options}"}
    result |= measure(assets_dir, optimizer, seed, evaluations, preset)
    save(result, out, result["held_out"])


if __name__ == "__main__":
    main()
