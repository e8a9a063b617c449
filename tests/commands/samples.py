"""What every command can be called with, in one folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crepe_deploy.cli import run
from tests.bench.report_runs import small
from tests.pico import make_pico_llama, sample_text
from tests.pico_moe import make_moe

SUITE = {
    "name": "a", "engine": "transformers", "candidates": [{"name": "a", "folder": "model"}],
    "points": [{"prompt_tokens": 8, "output_tokens": 2}], "rounds": 5,
}  # fmt: skip
BUDGETS = {"relative": [{"metric": "tpot_s", "max_slowdown": 0.05, "floor": 0.0001}]}


def enter_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `folder` the working one, with model/, pruned/, mixtral/, text.txt, run.json, suite.yaml, budgets.yaml."""
    make_pico_llama(folder / "model")
    make_moe(folder / "mixtral", "mixtral")
    (folder / "text.txt").write_text(sample_text(2000))
    (folder / "run.json").write_text(small().model_dump_json())
    (folder / "suite.yaml").write_text(json.dumps(SUITE))
    (folder / "budgets.yaml").write_text(json.dumps(BUDGETS))
    monkeypatch.chdir(folder)
    assert run(["prune", "model", "--method", "magnitude", "--out", "pruned"]) == 0
