"""Models whose numbers are legal and odd: what a field of checkpoints holds that no trained model should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.pico import make_pico_llama

Weights = dict[str, Tensor]
Make = Callable[[Weights], object]  # changes them in place
LAYER = "model.layers.1.mlp.down_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
VALUE = "model.layers.0.self_attn.v_proj.weight"


def _fill(name: str, value: float) -> Make:
    return lambda weights: weights[name].fill_(value)


def _scale(name: str, factor: float) -> Make:
    return lambda weights: weights[name].mul_(factor)


def _one(name: str, value: float) -> Make:
    return lambda weights: weights[name][3:4, 5:6].fill_(value)


def _rows(weights: Weights) -> None:
    weights[LAYER][::3] = 0


def _columns(weights: Weights) -> None:
    weights[LAYER][:, ::3] = 0


def _all_but_one(weights: Weights) -> None:
    weights[LAYER][:] = 0
    weights[LAYER][2, 7] = 1.0


def _rank_one(weights: Weights) -> None:
    weights[LAYER].copy_(torch.outer(weights[LAYER][:, 0], weights[LAYER][0]))


def _huge_and_tiny(weights: Weights) -> None:
    weights[LAYER][::2] *= 1e4
    weights[LAYER][1::2] *= 1e-4


def _dead_inputs(weights: Weights) -> None:
    weights[UP][::5] = 0


def _all_dead_but_one(weights: Weights) -> None:
    weights[UP][1:] = 0


def _zero_block(weights: Weights) -> None:
    for name in weights:
        if name.startswith("model.layers.1.") and weights[name].ndim == 2:
            weights[name].zero_()


def _same_embeddings(weights: Weights) -> None:
    weights["model.embed_tokens.weight"][:] = weights["model.embed_tokens.weight"][5].clone()


ODD: dict[str, Make] = {
    "zero layer": _fill(LAYER, 0.0),
    "zero layer before another": _fill(UP, 0.0),
    "zero values": _fill(VALUE, 0.0),
    "zero block": _zero_block,
    "zero rows": _rows,
    "zero columns": _columns,
    "all zero but one": _all_but_one,
    "all alike": _fill(LAYER, 0.25),
    "rank one": _rank_one,
    "huge and tiny rows": _huge_and_tiny,
    "dead inputs": _dead_inputs,
    "one live input": _all_dead_but_one,
    "zero gain": _fill("model.layers.0.input_layernorm.weight", 0.0),
    "zero embeddings": _fill("model.embed_tokens.weight", 0.0),
    "one embedding for all": _same_embeddings,
    "small": _scale(LAYER, 1e-6),
}
# What float16 does not hold.
WIDE: dict[str, Make] = {
    "one of 1e30": _one(LAYER, 1e30),
    "one of 1e30 before another": _one(UP, 1e30),
    "all of 1e25": _scale(LAYER, 1e25),
    "all of 1e-25": _scale(LAYER, 1e-25),
    "subnormal": _scale(LAYER, 1e-39),
    "values of 1e25": _scale(VALUE, 1e25),
}
HALF: dict[str, Make] = {
    "at float16's limit": _fill(LAYER, 65504.0),
    "one at float16's limit": _one(LAYER, 65504.0),
    "float16 subnormal": _fill(LAYER, 6e-8),
    "overflow in the last block": _scale(UP, 1e5),
}


def odd_model(folder: Path, make: Make, dtype: torch.dtype = torch.float32) -> Path:
    """A pico Llama whose weights `make` has changed."""
    make_pico_llama(folder, dtype=dtype)
    file = folder / "model.safetensors"
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    make(weights)
    limit = torch.finfo(dtype).max
    kept = {name: tensor.clamp(-limit, limit).to(dtype).contiguous() for name, tensor in weights.items()}
    save_file(kept, file, {"format": "pt"})
    return folder
