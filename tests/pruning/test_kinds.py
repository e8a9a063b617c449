"""A preset with hyperparameters by kind of layer: each layer is pruned as its own setting alone would prune it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.texts import calibration_windows, load_tokenizer
from tests.pico import make_pico_llama, sample_text

BASE = {"exponent": 1.0}
OWN = {"exponent": 0.25, "gamma": 0.5, "neighbourhood": "column"}


def test_every_kind_has_its_own_and_what_names_no_layer_is_said(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(sample_text(2000), encoding="utf-8")
    calibration = calibration_windows(text, load_tokenizer(model), 4, 32)
    preset = {"name": "mine", "method": "crepe", "params": BASE, "kinds": {"down_proj": OWN, "c_fc": OWN}}
    (tmp_path / "mine.json").write_text(json.dumps(preset))
    for name, params in (("base", BASE), ("own", OWN)):
        config = prune_config("crepe", "2:4", preset="ria", params=params)
        prune(resolve_model(str(model)), tmp_path / name, config, calibration)
    config = prune_config(pattern="2:4", preset=tmp_path / "mine.json")
    manifest = prune(resolve_model(str(model)), tmp_path / "mixed", config, calibration)
    assert manifest.config["kinds"]["down_proj"] == vars(config.kinds["down_proj"])
    assert manifest.metrics["limits"] == ["the preset's coefficients for c_fc are for no layer that is pruned here"]
    files = {name: CheckpointReader(tmp_path / name) for name in ("base", "own", "mixed")}
    for info in files["mixed"]:
        base, own, mixed = (files[name].load(info.name) for name in ("base", "own", "mixed"))
        assert torch.equal(mixed, own if "down_proj" in info.name else base)
        if "down_proj" in info.name:
            assert not torch.equal(own, base)
