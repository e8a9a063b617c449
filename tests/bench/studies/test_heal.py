"""The healing study on a tiny model: cells once, pruned models kept, tables from the file alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from crepe_deploy.bench.assets import Assets
from crepe_deploy.bench.studies import heal

from tests.pico import make_pico_llama, sample_text


def test_cells_are_measured_once_and_tabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = Assets(tmp_path)
    make_pico_llama(assets.model, torch.bfloat16)
    for seed, name in enumerate(("wiki", "c4")):
        assets.text(name, "train").write_text(sample_text(3000, seed))
        assets.text(name).write_text(sample_text(400, seed + 2))
    monkeypatch.setattr(heal, "ensure_assets", lambda _: assets)
    monkeypatch.setattr(heal, "STARTS", {"2:4": ("prune", "--method", "magnitude", "--sparsity", "2:4")})
    arguments = [
        "--starts", "", "--minutes", "0,0.1", "--seeds", "0", "--window", "64", "--max-tokens", "256",
        "--folder", str(tmp_path / "work"), "--out", str(tmp_path / "heal.json"),
        "--markdown", str(tmp_path / "heal.md"),
    ]  # fmt: skip
    first = CliRunner().invoke(heal.main, arguments, catch_exceptions=False)
    assert first.exit_code == 0
    result = json.loads((tmp_path / "heal.json").read_text())
    assert sorted(result["cells"]) == ["2:4|0.1|0", "2:4|0|0"]
    assert result["cells"]["2:4|0.1|0"]["healed"]["steps"] > 0
    assert [path.name for path in (tmp_path / "work").iterdir() if not path.name.startswith(".")] == ["2-4-0"]
    page = (tmp_path / "heal.md").read_text()
    assert "| perplexity (lower is better) after minutes | 0 | 0.1 |" in page and page.count("| 2:4 |") == 2
    again = CliRunner().invoke(heal.main, arguments, catch_exceptions=False)
    assert again.stderr.count("measured before") == 2 and json.loads((tmp_path / "heal.json").read_text()) == result
