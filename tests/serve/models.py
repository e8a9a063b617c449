"""Tiny checkpoints that vLLM can serve."""

from __future__ import annotations

from pathlib import Path

import torch
from crepe_deploy.exporting.pipeline import prune_and_export

from crepe_deploy.pruning.config import prune_config
from crepe_deploy.store.sources import resolve_model
from tests.pico import make_pico_llama


def exports(folder: Path, pattern: str, dtype: torch.dtype, allocate: str | None = None) -> dict[str, Path]:
    """A random Llama with head size 32, which vLLM's CPU attention serves, pruned: its dense and packed exports."""
    model = make_pico_llama(folder / "model", dtype, hidden_size=128, intermediate_size=256)
    config = prune_config("magnitude", pattern, allocate=allocate)
    prune_and_export(resolve_model(str(model)), folder / "out", config, None, formats=("dense", "packed"))
    return {name: folder / "out" / name for name in ("dense", "packed")}
