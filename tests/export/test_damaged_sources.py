"""Folders that were signed again after they were changed, and graphs that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from crepe_deploy.exporting.frame.card import card_text
from crepe_deploy.exporting.frame.run import read_source
from crepe_deploy.exporting.registry import exporter_class
from safetensors.torch import load_file, save_file

from crepe_deploy.cli import run
from crepe_deploy.pattern import parse_pattern
from crepe_deploy.store.audit import holds
from crepe_deploy.store.manifest import hash_folder, load_manifest, save_manifest
from tests.mutations import mutations, refusal
from tests.pico import make_pico_llama

Weights = dict[str, torch.Tensor]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    model = make_pico_llama(tmp_path / "m")
    formats = ["--method", "magnitude", "--format", "packed"]
    assert run(["prune-and-export", str(model), *formats, "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out" / "packed"


def signed_again(folder: Path) -> None:
    manifest = load_manifest(folder)
    save_manifest(folder, manifest.model_copy(update={"files": hash_folder(folder)}))


def without_a_norm(weights: Weights) -> None:
    del weights["model.layers.0.input_layernorm.weight"]


def nan_in_a_norm(weights: Weights) -> None:
    weights["model.norm.weight"][3] = torch.nan


def nan_in_packed(weights: Weights) -> None:
    weights["model.layers.0.mlp.up_proj.weight_values"][3, 3] = torch.inf


@pytest.mark.parametrize(
    ("change", "word"),
    [(without_a_norm, "input_layernorm.weight' is missing"), (nan_in_a_norm, "NaN"), (nan_in_packed, "NaN")],
)
@pytest.mark.parametrize("format", ["dense", "onnx"])
def test_a_packed_folder_signed_again_is_checked_all_the_same(
    packed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Weights], None],
    word: str,
    format: str,
) -> None:
    weights = load_file(packed / "model.safetensors")
    change(weights)
    save_file(weights, packed / "model.safetensors", metadata={"format": "pt"})
    signed_again(packed)
    assert run(["export", str(packed), "--format", format, "--out", str(tmp_path / "again")]) == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_a_packed_layer_under_ignore_is_named(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["ignore"].append("model.layers.0.mlp.up_proj")
    (packed / "config.json").write_text(json.dumps(config))
    signed_again(packed)
    for command in (["inspect", str(packed)], ["export", str(packed), "--out", str(tmp_path / "again")]):
        assert run(command) == 2
        assert "'model.layers.0.mlp.up_proj.weight' is stored packed" in capsys.readouterr().err


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import onnx

    folder = tmp_path_factory.mktemp("graph")
    weight = onnx.numpy_helper.from_array(torch.eye(64).numpy(), "w")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 64]) for name in "xy"]
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight]))
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return folder


def test_graphs_are_inspected(graph: Path) -> None:
    assert run(["inspect", str(graph), "--json"]) == 0


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_cut_graphs_are_refused(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float) -> None:
    data = (graph / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(data[: int(len(data) * share)])
    (tmp_path / "model.onnx.data").write_bytes((graph / "model.onnx.data").read_bytes())
    assert run(["inspect", str(tmp_path)]) == 2
    assert "unexpected" not in capsys.readouterr().err


@pytest.mark.parametrize("where", ["link", "fifo", "missing", "short"])
def test_weights_of_a_graph_lie_in_its_folder(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    (folder / "model.onnx").write_bytes((graph / "model.onnx").read_bytes())
    data = folder / "model.onnx.data"
    if where == "link":
        data.symlink_to(graph / "model.onnx.data")
    elif where == "fifo":
        os.mkfifo(data)
    elif where == "short":
        data.write_bytes(bytes(100))
    assert run(["inspect", str(folder)]) == 2
    assert "model.onnx.data" in capsys.readouterr().err


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    model = make_pico_llama(tmp_path / "m")
    assert run(["prune", str(model), "--method", "magnitude", "--out", str(tmp_path / "pruned")]) == 0
    return tmp_path / "pruned"


def test_a_manifest_spoilt_anywhere_is_refused_or_gives_a_card(pruned: Path) -> None:
    good = json.loads((pruned / "manifest.json").read_text())
    good["tensors"] = dict([*good["tensors"].items()][:1])
    exporter = exporter_class("dense")()
    for change, document in mutations(good, (None, "x", -1, 2**64, 0.5, [], {"x": None})):
        (pruned / "manifest.json").write_text(json.dumps(document))
        refusal(change, lambda: card_text(read_source(exporter, pruned, fresh=False).manifest, exporter.words))


def test_a_pruned_tensor_that_the_weights_do_not_hold_is_named(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (pruned / "manifest.json").read_text()
    (pruned / "manifest.json").write_text(text.replace("layers.1.mlp.gate_proj", "layers.1.ml//p.gate_proj"))
    assert run(["export", str(pruned), "--format", "int8", "--out", str(tmp_path / "out")]) in (1, 2)
    assert "ml//p.gate_proj" in (said := capsys.readouterr().err) and "unexpected" not in said


@pytest.mark.parametrize("format", ["dense", "packed", "int8", "gguf"])
@pytest.mark.parametrize("shape", [[0, 64], [-1, 64], [64, 10**30], [7, 11]])
def test_a_pruned_tensor_of_another_shape_is_named(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, shape: list[int]
) -> None:
    document = json.loads((pruned / "manifest.json").read_text())
    document["tensors"]["model.layers.1.mlp.gate_proj.weight"]["shape"] = shape
    (pruned / "manifest.json").write_text(json.dumps(document))
    assert run(["export", str(pruned), "--format", format, "--out", str(tmp_path / "out")]) in (1, 2)
    assert "layers.1.mlp.gate_proj" in (said := capsys.readouterr().err) and "unexpected" not in said


@pytest.mark.parametrize("shape", [(8, 1), (8,), (8, 0), (0, 4), (0, 2, 4), (2, 2, 2, 4), (4, 6)])
def test_weights_of_another_shape_hold_no_pattern(shape: tuple[int, ...]) -> None:
    assert not holds(torch.zeros(shape), parse_pattern("2:4"))
    if len(shape) != 2 or 0 in shape:
        assert not holds(torch.zeros(shape), parse_pattern("0.5"))
