"""The slices that the structural benchmark measures hold half, and what is said of them before they run is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from crepe_deploy.bench.run.candidate import describe_folder, kv_token_bytes
from crepe_deploy.bench.studies.pruning import LLAMA_1B
from crepe_deploy.bench.studies.structural_speed import SHAPES, Shape, build, even_widths, spread, uneven_widths
from crepe_deploy.exporting.pipeline import export_checkpoint
from transformers import LlamaConfig

from crepe_deploy.store.manifest import load_manifest
from crepe_deploy.structural.plan import Geometry
from tests.structural.random_plans import make_model

SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3}  # fmt: skip


@pytest.mark.parametrize(("name", "config"), [("smollm2", SMOLLM2), ("llama-1b", LLAMA_1B)])
def test_both_slices_keep_half(name: str, config: dict[str, int]) -> None:
    geometry, shape = Geometry.from_config(LlamaConfig(**config)), SHAPES[name]
    unit = shape.multiple * geometry.neuron_parameters
    for widths, error in (
        (even_widths(geometry, shape), geometry.layers * unit / 2),
        (uneven_widths(geometry, shape), unit),
    ):
        kept = sum(
            geometry.layer_parameters(layer.kv_heads, layer.heads // layer.kv_heads, layer.intermediate)
            for layer in widths
        )
        assert abs(kept - geometry.parameters / 2) <= error
        assert all(0 < layer.intermediate <= geometry.intermediate and layer.intermediate % 32 == 0 for layer in widths)
        assert all(0 < layer.kv_heads <= geometry.kv_heads for layer in widths)
    assert len(set(even_widths(geometry, shape))) == 1 and len(set(uneven_widths(geometry, shape))) >= 5


def test_units_are_spread() -> None:
    assert spread(4, 8) == (0, 2, 4, 6) and spread(3, 3) == (0, 1, 2) and spread(1, 9) == (0,)


def test_slices_are_built_and_described(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", torch.float32)
    uniform, per_layer = build(tmp_path / "out", model, Shape(groups=2, uneven_groups=(1, 2, 3), multiple=8))
    assert load_manifest(per_layer).metrics["parameters"]["kept"] == pytest.approx(0.5, abs=0.03)
    assert kv_token_bytes(uniform, "float32") == 2 * 3 * 2 * 8 * 4
    assert kv_token_bytes(per_layer, "float32") == 2 * (1 + 2 + 3) * 8 * 4
    export_checkpoint(per_layer, tmp_path / "deci", "deci")
    padded = load_manifest(tmp_path / "deci").config["structural"]["padded_to"]
    assert kv_token_bytes(tmp_path / "deci", "float32") == 2 * sum(groups for _, groups, _ in padded) * 8 * 4
    assert describe_folder(per_layer)["kind"] == "evenly spread structural dense"
    before = (per_layer / "manifest.json").stat().st_mtime_ns
    build(tmp_path / "out", model, Shape(groups=2, uneven_groups=(1, 2, 3), multiple=8))
    assert (per_layer / "manifest.json").stat().st_mtime_ns == before
