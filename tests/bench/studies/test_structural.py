"""The structural grid on a tiny model: cells once, conditions kept apart, tables from the file alone, honest pace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from crepe_deploy.bench.studies import structural, structural_table

from crepe_deploy.errors import ConfigError
from tests.pico import make_pico_llama, sample_text

SIZES = (
    "--samples", "4", "--length", "32", "--search-samples", "2", "--iterations", "1", "--generations", "1",
    "--offspring", "4", "--ffn-multiple", "16", "--window", "32", "--max-tokens", "128",
)  # fmt: skip


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pico") / "model"
    return make_pico_llama(folder, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)


def test_the_grid_measures_each_cell_once_and_writes_the_page(pico: Path, tmp_path: Path) -> None:
    (tmp_path / "calib.txt").write_text(sample_text(3000), encoding="utf-8")
    (tmp_path / "text.txt").write_text(sample_text(1000, 1), encoding="utf-8")
    arguments = [
        "--model", str(pico), "--calib", str(tmp_path / "calib.txt"), "--text", str(tmp_path / "text.txt"),
        "--sparsities", "0.25", "--seeds", "0", "--rows", "^(Tyr|uniform, best split|magnitude)$", *SIZES,
        "--out", str(tmp_path / "grid.json"), "--work", str(tmp_path / "work"), "--markdown", str(tmp_path / "grid.md"),
    ]  # fmt: skip
    first = CliRunner().invoke(structural.main, arguments, catch_exceptions=False)
    assert first.exit_code == 0
    result = json.loads((tmp_path / "grid.json").read_text())
    assert sorted(result["cells"]) == ["Tyr|0.25|0", "magnitude|0.25|0", "uniform, best split|0.25|0"]
    searched, even = result["cells"]["Tyr|0.25|0"], result["cells"]["uniform, best split|0.25|0"]
    assert searched["config"]["search_samples"] == even["config"]["search_samples"] == 2
    assert even["config"]["attention_share"] == searched["split"]["best"]["attention_share"] and even["split"] is None
    assert [sum(layer["kv_heads"] for layer in cell["layers"]) for cell in (searched, even)] == [
        searched["split"]["best"]["attention"]
    ] * 2
    kept = {cell["parameters"]["kept"] for cell in result["cells"].values()}
    assert len(kept) == 1
    assert result["cells"]["Tyr|0.25|0"]["kl"]["value"] > 0
    pace = result["throughput"]
    assert pace["largest_relative_fitness_difference"] < 1e-3
    for way in (pace["same_windows"], pace["generation"]):
        assert way["ratio"] == pytest.approx(way["candidates_a_minute"] / way["from_scratch_a_minute"])
    page = (tmp_path / "grid.md").read_text()
    assert "searched on 2 further windows" in page
    assert "25.0% of the linear parameters removed" in page and "| Tyr | 1 |" in page and "Judging candidates" in page
    again = CliRunner().invoke(structural.main, arguments, catch_exceptions=False)
    assert "measured before" in again.stderr and json.loads((tmp_path / "grid.json").read_text()) == result
    with pytest.raises(ConfigError, match="other conditions"):
        CliRunner().invoke(structural.main, [*arguments, "--window", "16"], catch_exceptions=False)


def test_rows_with_one_option_changed_are_compared_on_the_same_seeds() -> None:
    def cell(seed: int, perplexity: float, width: int) -> structural_table.Cell:
        return {
            "config": {"seed": seed}, "perplexity": {"value": perplexity}, "kl": {"value": 1.0}, "layers": [width],
            "parameters": {"kept": 10}, "seconds": 60,
        }  # fmt: skip

    rows = {
        "Tyr": [cell(1, 40.0, 7), cell(0, 10.0, 8)],
        "Tyr, --iterations 2": [cell(0, 8.0, 9)],
        "Tyr, --accumulation none": [cell(0, 10.0, 8), cell(1, 10.0, 7)],
        "absent, --iterations 2": [cell(0, 8.0, 9)],
    }
    *_, apart, more = structural_table.ablations(rows)
    assert more.startswith("| Tyr, --iterations 2 | 0 | 8.0 | 10.0 | 0.8 |") and more.endswith("| others |")
    assert apart.startswith("| Tyr, --accumulation none | 0, 1 | 10.0 | 20.0 | 0.5 |") and apart.endswith("the same |")
    assert structural_table.ablations({"Tyr": rows["Tyr"]}) == []


def test_every_row_is_a_valid_configuration() -> None:
    from crepe_deploy.structural.config import TyrConfig

    for label, options in structural.ROWS.items():
        TyrConfig(**{"sparsity": 0.5, **options}).check()
        assert "|" not in label
