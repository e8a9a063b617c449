"""Packed checkpoints whose layers keep different shares: written, read back, refused where they cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export

import crepe_deploy  # noqa: F401  registers the format with transformers
from crepe_deploy.commands.prune_and_export import lines as report_lines
from crepe_deploy.errors import CheckpointError, ConfigError
from crepe_deploy.packed.config import PackedConfig, packed_config
from crepe_deploy.pattern import NM, Unstructured
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.manifest import load_manifest
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.texts import calibration_windows, load_tokenizer
from tests.pico import VOCAB, make_pico_llama, sample_text

MIXED = PackedConfig(NM(16, 32), ("lm_head",), {"a.q": NM(12, 32), "a.k": NM(12, 32), "a.v": NM(20, 32)})


def mixed_exports(folder: Path, pattern: str = "16:32") -> Path:
    """A pico Llama pruned by magnitude, its blocks unevenly, as dense and packed; returns the folder of both."""
    model = make_pico_llama(folder / "m", num_hidden_layers=3)
    config = prune_config("magnitude", pattern, allocate="alpha:spread=0.5")
    prune_and_export(resolve_model(str(model)), folder / "out", config, None, formats=("dense", "packed"))
    return folder / "out"


@pytest.mark.parametrize("pattern", ["16:32", "0.5"])
def test_a_mixed_checkpoint_packs_reloads_and_answers_as_dense(tmp_path: Path, pattern: str) -> None:
    out = mixed_exports(tmp_path, pattern)
    manifest = load_manifest(out / "packed")
    assert len({record.pattern for record in manifest.tensors.values()}) > 1
    written = json.loads((out / "packed" / "config.json").read_text())["quantization_config"]
    assert written["version"] == 2
    for name, record in manifest.tensors.items():
        config = PackedConfig.from_dict(written).of(name.removesuffix(".weight"))
        assert str(config.pattern).removesuffix("/row") == record.pattern.removesuffix("/row")
    assert manifest.metrics["size"]["weight_bytes_over_dense"] == pytest.approx(0.5 + 1 / 32)
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    dense, packed = (tf.AutoModelForCausalLM.from_pretrained(out / name).eval() for name in ("dense", "packed"))
    with torch.inference_mode():
        torch.testing.assert_close(packed(tokens).logits, dense(tokens).logits, atol=1e-4, rtol=1e-4)
    packed.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert PackedConfig.from_dict(again) == PackedConfig.from_dict(written)


def test_and_comes_back_bit_by_bit(tmp_path: Path) -> None:
    out = mixed_exports(tmp_path)
    export_checkpoint(out / "packed", tmp_path / "back", "dense")
    before, after = CheckpointReader(out / "dense"), CheckpointReader(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert torch.equal(before.load(name), after.load(name))


def test_card_and_report_say_what_was_done(tmp_path: Path) -> None:
    out = mixed_exports(tmp_path)
    card = (out / "packed" / "README.md").read_text()
    assert "| allocate | Alpha (spread=0.5) |" in card
    assert "| pattern | 16:32 on average in 21 linear layers |" in card
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == {"allocate": {"class": "Alpha", "spread": 0.5}}
    assert sum(report["patterns"].values()) == 21
    assert any(line.startswith("steps: allocate alpha; patterns: ") for line in report_lines(report))


def test_a_recipe_and_the_scale_of_the_logits_are_said_too(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    (tmp_path / "calib.txt").write_text(sample_text(3000), encoding="utf-8")
    tokens = calibration_windows(tmp_path / "calib.txt", load_tokenizer(model), 8, 32, seed=0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: mine\nmethod: ria\nreconstruct: obs\nrescale: logits\n")
    config = prune_config(recipe=recipe)
    prune_and_export(resolve_model(str(model)), tmp_path / "out", config, tokens, formats=("packed",))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    lines = report_lines(report)
    assert lines[0].startswith("14 linear layers pruned to 2:4 with ria, recipe mine: 50.00%")
    factor = report["rescale"]["factor"]
    assert any(line.startswith(f"logits times {factor:.3f}: mean KL") for line in lines)
    assert f"| logits scaled by | {factor:.4f} |" in (tmp_path / "out" / "packed" / "README.md").read_text()


def test_configs_with_overrides_round_trip_and_the_rest_stay_version_1() -> None:
    assert PackedConfig.from_dict(json.loads(json.dumps(MIXED.to_dict()))) == MIXED
    assert MIXED.to_dict()["version"] == 2
    assert PackedConfig(NM(16, 32)).to_dict() == {
        "quant_method": "crepe_nm", "version": 1, "n": 16, "m": 32, "ignore": [],
    }  # fmt: skip
    rows = PackedConfig(Unstructured(0.5), (), {"a": Unstructured(1 - 7 / 96)})
    assert PackedConfig.from_dict(json.loads(json.dumps(rows.to_dict()))).of("a").geometry(96) == (7, 96)


def test_layers_that_are_served_as_one_must_agree() -> None:
    assert MIXED.of("a.q", "a.k").pattern == NM(12, 32)
    assert MIXED.of("a.o").pattern == NM(16, 32)
    with pytest.raises(ConfigError, match=r"served as one have different patterns: a\.q 12:32, .* a\.v 20:32"):
        MIXED.of("a.q", "a.k", "a.v")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 1 has no 'overrides'"),
        ({"overrides": ["a"]}, "'overrides' does not give modules their patterns"),
        ({"overrides": {"a": "12:32"}}, "'overrides' does not give modules their patterns"),
        ({"overrides": {"a": {"n": 12}}}, "no packed pattern"),
        ({"version": 4}, "version 4 is newer than the version 3"),
    ],
)
def test_wrong_overrides_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        PackedConfig.from_dict(MIXED.to_dict() | change)


def test_a_pattern_that_cannot_be_packed_is_refused_wherever_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be packed: rows keep different counts"):
        packed_config(Unstructured(0.5, "matrix"))
    model = make_pico_llama(tmp_path / "m")
    config = prune_config("magnitude", Unstructured(0.5, "matrix"), allocate="alpha")
    with pytest.raises(ConfigError, match="rows keep different counts"):
        prune_and_export(resolve_model(str(model)), tmp_path / "out", config, None, formats=("packed",))
    assert not (tmp_path / "out").exists()
