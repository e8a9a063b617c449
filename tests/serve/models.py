"""Tiny checkpoints that vLLM can serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export
from crepe_deploy.exporting.structural import assemble

from crepe_deploy.model.decoder import Decoder
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.structural.plan import Geometry
from tests.pico import make_pico_llama
from tests.structural.random_plans import Kept, make_model, random_plans

KEPT: tuple[Kept, ...] = ((4, 2, 256), (2, 2, 64), (3, 1, 96), (1, 1, 200))
# vLLM's Gemma 2 has no output layer but the tied one, and transformers' SDPA leaves the soft cap on scores out.
GEMMA = {"tie_word_embeddings": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {**GEMMA, "attn_logit_softcapping": None},
    "gemma3_text": GEMMA,
    "phi3": {},
}


def exports(folder: Path, pattern: str, dtype: torch.dtype, allocate: str | None = None) -> dict[str, Path]:
    """A random Llama with head size 32, which vLLM's CPU attention serves, pruned: its dense and packed exports."""
    model = make_pico_llama(folder / "model", dtype, hidden_size=128, intermediate_size=256)
    config = prune_config("magnitude", pattern, allocate=allocate)
    prune_and_export(resolve_model(str(model)), folder / "out", config, None, formats=("dense", "packed"))
    return {name: folder / "out" / name for name in ("dense", "packed")}


def narrowed(folder: Path) -> dict[str, Path]:
    """One random Llama, pruned to other widths in each layer: "per-layer" and the "deci" layout."""
    per_layer(folder, "llama")
    export_checkpoint(folder / "per-layer", folder / "deci", "deci")
    return {name: folder / name for name in ("per-layer", "deci")}


def per_layer(folder: Path, family: str) -> Path:
    """A random model with heads of 32, pruned to other widths in each layer."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    model = make_model(folder / "model", family, torch.float32, **sizes, **OTHERS.get(family, {}))
    plans = random_plans(Geometry.from_config(Decoder(model).config), KEPT)
    assemble(resolve_model(str(model)), plans, folder / "per-layer")
    return folder / "per-layer"
