"""Budgets files: what is refused, by name, and that the shipped ones load."""

from __future__ import annotations

from pathlib import Path

import pytest
from crepe_deploy.bench.gate.budgets import load_budgets

from crepe_deploy.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("budgets*.yaml")), ids=lambda path: path.name)
def test_shipped_budgets_load(path: Path) -> None:
    load_budgets(path)


def test_json_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"memory": {"peak": 0.02}}')
    assert load_budgets(tmp_path / "b.json").memory == {"peak": 0.02}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the document"),
        ("{}", "there is no budget in it"),
        ("relative: []", "there is no budget in it"),
        ("[1, 2]", "the document"),
        ("relative: [{metric: tpot_s, max_slowdown: 0.1, flor: 1}]", "relative.0.flor"),
        ("relative: [{metric: tpot, max_slowdown: 0.1}]", "unknown metric 'tpot'; there are ttft_s"),
        ("relative: [{metric: tpot_s}]", "relative.0.max_slowdown"),
        ("relative: [{metric: tpot_s, max_slowdown: -1}]", "relative.0.max_slowdown"),
        ("relative: [{metric: tpot_s, max_slowdown: .nan}]", "the number .nan"),
        ("relative: [{metric: tpot_s, max_slowdown: -0.1, floor: 1}]", "no floor applies"),
        ("objectives: [{metric: ttft_s}]", "either `max` or `min`"),
        ("objectives: [{metric: ttft_s, max: 1, min: 1}]", "either `max` or `min`"),
        ("objectives: [{metric: ttft_s, min: 1}]", "`min` is for"),
        ("objectives: [{metric: output_tokens_per_s, max: 1}]", "`max` is for"),
        ("objectives: [{metric: ttft_s, quantile: 95, max: 1}]", "objectives.0.quantile"),
        ("objectives: [{metric: output_tokens_per_s, quantile: 0.5, min: 1}]", "`min` is for the mean"),
        ("memory: {ram: 0.1}", "memory.ram"),
        ("memory: {peak: -2}", "memory.peak"),
        ("quality: {same_top: 1.5}", "quality.same_top"),
        ("schema_version: 2\nmemory: {peak: 0.1}", "schema_version"),
        ("memory: {peak: 0.1}\nmemory: {peak: 0.5}", "'memory' is given twice"),
        ("relative: [", "is not YAML"),
        ("memory: !!python/object:os.system {}", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "budgets.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"budgets\.yaml") as caught:
        load_budgets(path)
    assert message in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing"):
        load_budgets(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_budgets(tmp_path / "binary.yaml")
