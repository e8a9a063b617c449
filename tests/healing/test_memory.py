"""What healing is said to take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import crepe_deploy
from crepe_deploy.healing.config import HealConfig
from crepe_deploy.healing.memory import peak_bytes

CONFIG = HealConfig(window=64, batch_tokens=512)


@pytest.mark.parametrize("folder", ["nm", "tyr/dense", "dense"])
def test_what_saves_memory_is_said_to(room: Path, folder: str) -> None:
    whole = peak_bytes(room / folder, CONFIG)
    assert whole > 14 * 2 * 30_000
    for other in ({"accumulate": 4}, {"checkpointing": True}, {"train": ("norms",)}, {"batch_tokens": 128}):
        assert peak_bytes(room / folder, replace(CONFIG, **other)) < whole, other
    assert peak_bytes(room / folder, replace(CONFIG, dtype="float32")) > whole


def test_what_is_kept_grows_with_the_batch_alone(room: Path) -> None:
    sizes = [peak_bytes(room / "nm", replace(CONFIG, batch_tokens=tokens)) for tokens in (512, 1024, 1536)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] > 0


def test_plan_says_it(room: Path) -> None:
    plan = crepe_deploy.plan(room / "nm", heal=True)
    sizes = plan["heal_memory_estimate_bytes"]
    assert sizes["--accumulate 4"] < sizes["defaults"] and "heal_memory_estimate_bytes" not in crepe_deploy.plan(
        room / "nm"
    )
