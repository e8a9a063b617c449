"""Says when the environment is older than the tree; fixtures for the real model and texts, kept in `.cache/assets`."""

from __future__ import annotations

import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

for package in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]:
    if find_spec(package) is None:
        again = "pip install --no-deps --no-build-isolation -e ."
        raise pytest.UsageError(f"{package} is new since this environment was installed; run: python -m {again}")

from crepe_deploy.bench.assets import Assets, ensure_assets  # noqa: E402

from tests.pico import sample_text  # noqa: E402


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `faults`, unless -m asks for it."""
    if "faults" in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker("faults")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


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


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of words for the tokenizer of the tiny models to be calibrated on."""
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(sample_text(4000), encoding="utf-8")
    return path
