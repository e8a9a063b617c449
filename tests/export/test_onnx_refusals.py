"""What cannot be exported to ONNX is refused by name, before any work, with nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from crepe_deploy.exporting.onnx import export as onnx_export
from crepe_deploy.exporting.onnx.support import OnnxOptions, check_model, check_options
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export
from transformers import GPT2Config, LlamaConfig

from crepe_deploy.errors import ConfigError, DiskFullError, MissingExtra, UnsupportedModel
from crepe_deploy.model.families import FAMILIES
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.manifest import load_manifest, save_manifest
from crepe_deploy.store.sources import resolve_model
from tests.onnx_models import CONFIGS, pruned_model
from tests.pico import VOCAB, make_pico


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> None:
        raise AssertionError("the graph was built")

    monkeypatch.setattr(onnx_export, "build_portable", build)
    monkeypatch.setattr(onnx_export, "build_genai", build)


@pytest.mark.parametrize(
    ("flavor", "precision", "match"),
    [
        ("mobile", "fp32", "'mobile' is unknown; known: portable, genai"),
        ("portable", "int4", "int4 needs --onnx-flavor genai"),
        ("genai", "fp16", "cannot be run, and so not proven"),
        ("portable", "fp8", "it has fp32, fp16$"),
    ],
)
def test_options(tmp_path: Path, flavor: str, precision: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        export_checkpoint(tmp_path / "none", tmp_path / "out", "onnx", onnx=OnnxOptions(flavor, precision))


def test_a_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(MissingExtra, match=r"onnxscript.*pip install 'crepe-deploy\[onnx\]'"):
        check_options(OnnxOptions())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "genai" in name else found(name))
    check_options(OnnxOptions())
    with pytest.raises(MissingExtra, match="onnxruntime-genai"):
        check_options(OnnxOptions("genai"))


def test_families_and_rotary_embeddings_by_name(tmp_path: Path) -> None:
    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    model = make_pico(tmp_path / "gpt2", gpt2)
    prune(resolve_model(str(model)), tmp_path / "pruned", prune_config("magnitude", "2:4"), None)
    with pytest.raises(UnsupportedModel, match="'gpt2' cannot be exported to ONNX; families that can: llama"):
        export_checkpoint(tmp_path / "pruned", tmp_path / "out", "onnx")
    with pytest.raises(UnsupportedModel, match="'gpt2'"):  # before the pruning, not after
        config = prune_config("magnitude", "2:4")
        prune_and_export(resolve_model(str(model)), tmp_path / "out", config, None, formats=["dense", "onnx"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "pruned"]
    dynamic = LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UnsupportedModel, match="rotary embedding 'dynamic'"):
        check_model(dynamic, "portable")
    for name, family in FAMILIES.items():
        if "portable" in family.onnx and not family.per_layer_of:
            check_model(CONFIGS[name], "portable")
    with pytest.raises(UnsupportedModel, match=r"genai cannot export 'gemma3_text'.*use portable"):
        check_model(CONFIGS["gemma3_text"], "genai")
    with pytest.raises(UnsupportedModel, match="sliding window of 16"):
        check_model(CONFIGS["mistral"], "genai")


def test_a_full_disk_is_met_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pruned_model(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(DiskFullError, match="free some room"):
        export_checkpoint(source, tmp_path / "out", "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pruned"]


def test_rounded_sources_are_refused(tmp_path: Path) -> None:
    source = pruned_model(tmp_path)
    save_manifest(source, load_manifest(source).model_copy(update={"format": "int8"}))
    with pytest.raises(ConfigError, match="has the format int8"):
        export_checkpoint(source, tmp_path / "out", "onnx")
    assert json.loads((source / "manifest.json").read_text())["format"] == "int8"
    assert not (tmp_path / "out").exists()
