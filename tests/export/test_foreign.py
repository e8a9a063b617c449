"""Sparse folders that others made, or that were changed since: what is counted, packed, and said not to be known."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from crepe_deploy.exporting.frame.foreign import sparsest

from crepe_deploy.api.export import default_out
from crepe_deploy.cli import run
from crepe_deploy.pattern import NM, Unstructured
from crepe_deploy.store.checkpoint import CheckpointReader, same_bits
from crepe_deploy.store.manifest import verify
from tests.pico import make_pico_llama


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "16:32", "0.5"])
def test_a_sparse_folder_packs_to_what_pruning_and_packing_gives(tmp_path: Path, pattern: str) -> None:
    model, pruned = make_pico_llama(tmp_path / "m", torch.bfloat16), tmp_path / "pruned"
    assert run(["prune", str(model), "--method", "magnitude", "--sparsity", pattern, "--out", str(pruned)]) == 0
    assert run(["export", str(pruned), "--format", "packed", "--out", str(tmp_path / "known")]) == 0
    (pruned / "manifest.json").unlink()
    assert run(["export", str(pruned), "--format", "packed", "--out", str(tmp_path / "foreign")]) == 0
    known, foreign = CheckpointReader(tmp_path / "known"), CheckpointReader(tmp_path / "foreign")
    assert known.tensors.keys() == foreign.tensors.keys()
    assert all(same_bits(known.load(name), foreign.load(name)) for name in known.tensors)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("known", "foreign")]
    assert configs[0] == configs[1]
    record, other = verify(tmp_path / "foreign"), verify(tmp_path / "known")
    assert {name: each.pattern for name, each in record.tensors.items()} == {
        name: each.pattern for name, each in other.tensors.items()
    }
    assert record.config["method"] is None and record.calibration is None and record.parent is None
    card = (tmp_path / "foreign" / "README.md").read_text()
    assert "by which method and with what calibration is not recorded" in card and "an unknown method" in card


def test_a_dense_folder_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_pico_llama(tmp_path / "m")
    assert run(["export", str(model), "--format", "packed", "--out", str(tmp_path / "out")]) == 2
    assert "none of its tensors is pruned" in capsys.readouterr().err


def test_a_folder_that_is_no_longer_what_its_manifest_says_names_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, pruned = make_pico_llama(tmp_path / "m"), tmp_path / "pruned"
    assert run(["prune", str(model), "--method", "magnitude", "--out", str(pruned)]) == 0
    weights = pruned / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run(["export", str(pruned), "--format", "packed", "--out", str(tmp_path / "out")]) == 1
    assert "take manifest.json away" in capsys.readouterr().err


def test_the_sparsest_pattern_is_found() -> None:
    weight = torch.ones(4, 64)
    assert sparsest(weight) is None
    weight.view(4, 16, 4)[..., :2] = 0
    assert sparsest(weight) == NM(2, 4)
    weight = torch.ones(4, 64)
    weight[:, 5:9] = 0
    assert sparsest(weight) == Unstructured(4 / 64, "row")


def test_an_export_of_a_snapshot_does_not_land_in_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    assert default_out(snapshot, "packed") == snapshot.parent / "packed"
    (tmp_path / "models--owner--name" / "blobs").mkdir()
    assert default_out(snapshot, "packed") == Path("name-packed")
    assert default_out(os.fspath(tmp_path / "m"), "int8") == tmp_path / "int8"
