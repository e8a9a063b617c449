"""Scenarios that measure a dense and a packed folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crepe_deploy.bench.run.scenario import Scenario, parse

NAMES = ("dense", "packed")


def scenario_of(pair: Sequence[Path], **changes: Any) -> Scenario:
    """Both folders in the fake engine, at one small point; `changes` are keys of the scenario."""
    content: dict[str, Any] = {
        "name": "test",
        "engine": "fake",
        "threads": 1,
        "candidates": [{"name": name, "folder": str(folder)} for name, folder in zip(NAMES, pair, strict=True)],
        "points": [{"prompt_tokens": 8, "output_tokens": 4}],
        "rounds": 2,
        "warmup": 0,
    }
    return parse(content | changes, "test")
