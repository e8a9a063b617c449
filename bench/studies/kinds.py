"""Whether CRePE's coefficients gain by adapting to the kind of layer, and what one setting for all of them gives.

    python -m crepe_deploy.bench.studies.kinds [--seeds 0,1] [--out bench/results/kinds.json]

SmolLM2-135M-Instruct (dequantised Q4_1), 2:4, 16 x 512 calibration tokens of c4 train; 4 further windows of it are held
out. A walk over the kinds of layers (down, up, gate, o, v, q, k) begins at the one setting for all of least KL to the
dense model on the held-out windows. For each kind the other families and a step of the exponent up and down are tried,
a whole pass each, and the best is kept where both halves of the windows say so. No perplexity is looked at until the
walk is over; then what it found and the settings for all are judged on 16 x 512 tokens each of wiki valid and c4 valid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
import torch
from torch import Tensor, nn

from ...model.stats import Stats
from ...pattern import NM
from ...pruning.methods.crepe import Crepe
from ...quality.perplexity import load_model
from ...quality.scoring import kl_per_token, token_nll
from ...select import select
from ...store.manifest import versions
from ...texts import calibration_windows, first_tokens, load_tokenizer
from ..assets import MODEL_NAME, Assets, ensure_assets
from .frame import assets_option, out_option, save, say

PATTERN: Final = NM(2, 4)
SAMPLES, HELD_OUT, LENGTH, JUDGED = 16, 4, 512, 16
KINDS: Final = ("down", "up", "gate", "o", "v", "q", "k")
STEP: Final = 0.25  # of the exponent
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "ria": {},
    "smooth 0.1": {"gamma": 0.1, "kernel_size": 7, "neighbourhood": "smooth"},
    "column 0.3": {"gamma": 0.3, "neighbourhood": "column"},
    "wanda": {"beta": 0.0},  # inside groups: a row's own sum does not change its order
    "beta 3": {"beta": 3.0},
}
STARTS: Final = (("ria", 0.75), ("ria", 1.0), ("smooth 0.1", 0.75), ("column 0.3", 0.75), ("wanda", 1.0))
Setting = tuple[str, float]
Assignment = dict[str, Setting]


def kind_of(name: str) -> str:
    """Of a linear layer: `model.layers.3.mlp.down_proj` is a "down"."""
    return name.rpartition(".")[2].partition("_")[0]


def everywhere(setting: Setting) -> Assignment:
    """One setting for all kinds."""
    return dict.fromkeys(KINDS, setting)


@dataclass
class Masked:
    """A whole model in memory, masked anew for every assignment. passes: over the held-out windows, so far."""

    model: nn.Module
    held: Tensor
    passes: int = 0
    norms: dict[str, Tensor] = field(default_factory=dict)
    known: dict[tuple[Setting, ...], list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, nn.Linear) and kind_of(name) in KINDS
        }
        self.dense = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        with torch.inference_mode():
            self.reference = [self.model(window[None]).logits[0, :-1] for window in self.held]

    @torch.inference_mode()
    def collect(self, tokens: Tensor) -> None:
        """The norms of all inputs on the dense stream."""
        squares = {name: torch.zeros(weight.shape[1]) for name, weight in self.dense.items()}

        def watch(name: str) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                squares[name] += args[0].flatten(0, -2).float().square().sum(0)

            return hook

        handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in self.layers.items()]
        for window in tokens:
            self.model(window[None], logits_to_keep=1)
        for handle in handles:
            handle.remove()
        self.norms = {name: (total / len(tokens)).sqrt() for name, total in squares.items()}

    @torch.inference_mode()
    def mask(self, assignment: Assignment) -> None:
        """Prune every layer from its dense weight with its kind's setting."""
        for name, layer in self.layers.items():
            family, exponent = assignment[kind_of(name)]
            score = Crepe(exponent=exponent, **FAMILIES[family]).score(
                self.dense[name], Stats(col_norm=self.norms[name])
            )
            layer.weight.copy_(self.dense[name].masked_fill(~select(score, PATTERN), 0))

    @torch.inference_mode()
    def kl(self, assignment: Assignment) -> list[float]:
        """To the dense model, a mean for each held-out window."""
        key = tuple(assignment[kind] for kind in KINDS)
        if key not in self.known:
            self.mask(assignment)
            self.passes += 1
            self.known[key] = [
                float(kl_per_token(dense, self.model(window[None]).logits[0, :-1]).mean())
                for window, dense in zip(self.held, self.reference, strict=True)
            ]
        return self.known[key]

    @torch.inference_mode()
    def perplexity(self, assignment: Assignment, windows: Tensor) -> float:
        """On other windows (count, length)."""
        self.mask(assignment)
        nll = [float(token_nll(self.model(ids[None]).logits[0, :-1], ids[1:]).mean()) for ids in windows]
        return math.exp(sum(nll) / len(nll))


def mean(values: list[float]) -> float:
    """Of windows."""
    return sum(values) / len(values)


def better(new: list[float], old: list[float]) -> bool:
    """Whether both halves of the windows say so."""
    half = len(new) // 2
    return mean(new[:half]) < mean(old[:half]) and mean(new[half:]) < mean(old[half:])


def walk(masked: Masked) -> Assignment:
    """The assignment that one walk over the kinds ends with."""
    current = min(map(everywhere, STARTS), key=lambda one: mean(masked.kl(one)))
    for kind in KINDS:
        family, exponent = current[kind]
        tried: list[Setting] = [(other, exponent) for other in FAMILIES if other != family]
        tried += [(family, exponent + STEP), (family, exponent - STEP)]
        candidates = [current | {kind: setting} for setting in tried]
        kept = [one for one in candidates if better(masked.kl(one), masked.kl(current))]
        current = min([*kept, current], key=lambda one: mean(masked.kl(one)))
        say(f"{kind}: {current[kind]}, KL {mean(masked.kl(current)):.4f} after {masked.passes} passes")
    return current


def measure(assets: Assets, seed: int) -> dict[str, Any]:
    """What one calibration seed finds, and the perplexities of that and of each setting for all."""
    tokenizer = load_tokenizer(assets.model)
    tokens = calibration_windows(assets.text("c4", "train"), tokenizer, SAMPLES + HELD_OUT, LENGTH, seed=seed).tokens
    masked = Masked(load_model(assets.model), tokens[SAMPLES:])
    masked.collect(tokens[:SAMPLES])
    found = walk(masked)
    spent = masked.passes
    judged = {
        name: first_tokens(tokenizer, assets.text(name, "valid"), "text", JUDGED * LENGTH)[0].view(JUDGED, LENGTH)
        for name in ("wiki", "c4")
    }
    rows = {"by kind": found}
    rows |= {f"{family}, a = {exponent:g}": everywhere((family, exponent)) for family, exponent in STARTS}
    return {
        "found": {kind: list(setting) for kind, setting in found.items()},
        "passes": spent,
        "rows": {
            label: {"kl": mean(masked.kl(one))}
            | {name: masked.perplexity(one, windows) for name, windows in judged.items()}
            for label, one in rows.items()
        },
        "tried": [{"settings": [list(one) for one in key], "kl": value} for key, value in masked.known.items()],
    }


@click.command()
@click.option("--seeds", default="0,1", show_default=True)
@out_option("bench/results/kinds.json")
@assets_option
def main(seeds: str, out: Path, assets_dir: Path) -> None:
    """Measure every seed and write what it gave."""
    assets = ensure_assets(assets_dir)
    result = {
        "command": f"python -m crepe_deploy.bench.studies.kinds --seeds {seeds}",
        "model": MODEL_NAME,
        "versions": versions(),
        "seeds": {seed: measure(assets, int(seed)) for seed in seeds.split(",")},
    }
    save(result, out, {seed: one["rows"] for seed, one in result["seeds"].items()})


if __name__ == "__main__":
    main()
