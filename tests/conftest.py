"""Fixtures for the real model and texts; they are fetched once into `.cache/assets`."""

from __future__ import annotations

from pathlib import Path

import pytest
from crepe_deploy.bench.assets import Assets, ensure_assets

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def assets() -> Assets:
    """The real model and texts, fetched if missing."""
    return ensure_assets(ROOT / ".cache" / "assets")


@pytest.fixture(scope="session")
def assets_dir(assets: Assets) -> Path:
    """The folder with `smollm2-135m-instruct/`, the GGUF file and `{wiki,c4}.{train,valid,test}.txt`."""
    return assets.directory


@pytest.fixture(scope="session")
def smollm2(assets: Assets) -> Path:
    """SmolLM2-135M-Instruct, dequantised Q4_1, as a Hugging Face folder in bf16."""
    return assets.model
