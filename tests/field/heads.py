"""Folders whose config.json ties the output layer to the embedding while the files say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.pico import make_pico_llama

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def own_head(root: Path) -> Path:
    """Both are stored, and differ."""
    return _stored(root, lambda weights: {**weights, HEAD: weights[EMBEDDING].flip(0).contiguous()})


def head_alone(root: Path) -> Path:
    """The output layer is stored, the embedding is not."""
    return _stored(root, lambda weights: {HEAD if name == EMBEDDING else name: weights[name] for name in weights})


def _stored(root: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    folder = make_pico_llama(root / "m", tie_word_embeddings=True)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
