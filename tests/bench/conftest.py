"""A tiny pruned model in two formats, for the tests that measure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from crepe_deploy.exporting.pipeline import prune_and_export

from crepe_deploy.pruning.config import prune_config
from crepe_deploy.store.sources import resolve_model
from tests.pico import make_pico_llama


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Dense and packed exports of one 2:4 pruning, of a size that vLLM's CPU attention takes. Not to be written to."""
    root = tmp_path_factory.mktemp("bench")
    model = make_pico_llama(root / "model", torch.bfloat16, tie_word_embeddings=True, head_dim=32)
    config = prune_config("magnitude", "2:4")
    prune_and_export(resolve_model(str(model)), root / "out", config, None, formats=("dense", "packed"))
    return root / "out" / "dense", root / "out" / "packed"
