"""A dense model, text, and what was pruned from it, made once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import crepe_deploy
from crepe_deploy.cli import run
from crepe_deploy.healing import train
from crepe_deploy.store.manifest import Manifest
from tests.once import once
from tests.pico import QUICK_TYR, make_pico_llama, sample_text

Heal = Callable[..., Manifest]


@pytest.fixture(scope="session")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders `dense`, `nm` (2:4), `row` (50 %) and `tyr/dense` (widths per layer), and `text.txt`."""
    place = tmp_path_factory.getbasetemp()
    root = (place.parent if place.name.startswith("popen") else place) / "healing-room"

    def make(_: Path) -> None:
        root.mkdir()
        (root / "text.txt").write_text(sample_text(3000))
        make_pico_llama(root / "dense", torch.bfloat16, num_attention_heads=8, num_key_value_heads=4)
        crepe_deploy.prune(root / "dense", root / "nm", method="magnitude", sparsity="2:4")
        crepe_deploy.prune(root / "dense", root / "row", method="magnitude", sparsity=0.5)
        text = str(root / "text.txt")
        assert run(["tyr", str(root / "dense"), "--calib", text, "--calib-length", "32", *QUICK_TYR,
                    "--out", str(root / "tyr")]) == 0  # fmt: skip

    once(tmp_path_factory, "healing", make)
    return root


@pytest.fixture
def second_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock for training on which every step takes a second, however long it takes."""
    seconds = itertools.count()
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))


@pytest.fixture
def heal(room: Path, tmp_path: Path) -> Heal:
    """`crepe_deploy.heal` with a budget and sizes for these models; writes `tmp_path/out`."""

    def call(folder: str | Path = "nm", **options: Any) -> Manifest:
        settings = {"dense": room / "dense", "text": room / "text.txt", "steps": 12, "learning_rate": 1e-3,
                    "batch_tokens": 128, "window": 32, "out": tmp_path / "out", **options}  # fmt: skip
        return crepe_deploy.heal(room / folder, **settings)

    return call


def kl(folder: Path, room: Path) -> float:
    """Mean KL of a folder's predictions to the dense model's on other text than any that was trained on."""
    (room / "other.txt").write_text(sample_text(500, seed=5))
    report = crepe_deploy.evaluate(folder, text=room / "other.txt", window=64, against=room / "dense")
    assert report.quality is not None and report.quality.paired is not None
    return report.quality.paired.kl_mean.value
