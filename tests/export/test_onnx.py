"""ONNX export: every family, either flavour, says what its checkpoint says, and claims about zeros what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from crepe_deploy.exporting.formats import onnx as onnx_export
from crepe_deploy.exporting.onnx.checks import graph_metadata
from crepe_deploy.exporting.onnx.inspect import inspect_onnx
from crepe_deploy.exporting.onnx.portable import build_portable, write_graph
from crepe_deploy.exporting.onnx.recount import recount
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export
from torch import nn
from transformers import AutoModelForCausalLM

from crepe_deploy.cli import cli
from crepe_deploy.errors import CheckpointError, ParityError, UnsupportedModel, VerifyError
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.store.manifest import sha256_file, verify
from crepe_deploy.store.sources import resolve_model
from tests.onnx_models import CONFIGS, pruned_model
from tests.pico import make_pico, make_pico_llama


def as_portable(source: Path, out: Path, precision: str = "fp32") -> dict[str, Any]:
    manifest = export_checkpoint(source, out, "onnx", options={"precision": precision})
    return manifest.metrics["onnx"]  # type: ignore[no-any-return]


def logits_of(folder: Path, ids: list[list[int]], pad: list[int]) -> np.ndarray[Any, Any]:
    """One call of the graph in plain ONNX Runtime, each row's first `pad` places masked: none of our own code."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokens = np.array(ids, np.int64)
    mask = np.array([[int(place >= left) for place in range(tokens.shape[1])] for left in pad], np.int64)
    feed = {"input_ids": tokens, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feed[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    return np.asarray(session.run(["logits"], feed)[0])


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned Llama and its portable graph."""
    folder = tmp_path_factory.mktemp("portable")
    source = pruned_model(folder)
    as_portable(source, folder / "onnx")
    return source, folder / "onnx"


def check_record(record: dict[str, Any], flavor: str) -> None:
    runs = record["parity"]["runs"]
    assert record["parity"]["greedy_tokens"] == 64
    assert all(run["greedy_agreed"] == run["greedy_total"] >= 64 for run in runs.values()), runs
    assert record["parity"]["max_abs_logit_difference"] < 1e-4
    assert ("left-padded batch" in runs) == (flavor == "portable")
    assert ("onnxruntime-genai" in runs) == (flavor == "genai")
    assert record["graph"]["checker"] == "passed, full"
    assert record["sparsity"]["pattern_holds_in"] == record["sparsity"]["of"] > 0
    assert record["sparsity"]["tensorrt"]["onnxruntime_provider_option"] == "trt_sparsity_enable=1"


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3_text"])
def test_every_family_as_a_portable_graph(tmp_path: Path, family: str) -> None:
    check_record(as_portable(pruned_model(tmp_path, family), tmp_path / "onnx"), "portable")


@pytest.mark.parametrize("family", ["llama", "mistral without a window", "qwen2", "qwen3"])
def test_every_family_as_a_genai_graph(tmp_path: Path, family: str) -> None:
    source = pruned_model(tmp_path, family)
    manifest = export_checkpoint(source, tmp_path / "onnx", "onnx", options={"flavor": "genai", "precision": "fp32"})
    check_record(manifest.metrics["onnx"], "genai")
    assert "must have one length" in manifest.metrics["onnx"]["padding"]


def test_the_graph_alone_says_what_transformers_says(portable: tuple[Path, Path]) -> None:
    source, folder = portable
    manifest = verify(folder)
    check_record(manifest.metrics["onnx"], "portable")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    short, long = [5, 9, 30], [7, 100, 200, 30, 12, 9]
    found = logits_of(folder, [[0, 0, 0, *short], long], [3, 0])
    with torch.inference_mode():
        for row, ids in ((found[0, 3:], short), (found[1], long)):
            assert np.abs(row - model(torch.tensor([ids])).logits[0].numpy()).max() < 1e-4


def test_names_dimensions_and_origin(portable: tuple[Path, Path]) -> None:
    source, folder = portable
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    names = [value.name for value in graph.graph.input]
    assert names[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert [value.name for value in graph.graph.output][:2] == ["logits", "present.0.key"]
    batch, heads, past, width = graph.graph.input[3].type.tensor_type.shape.dim
    assert (batch.dim_param, heads.dim_value, past.dim_param, width.dim_value) == (
        "batch_size", 2, "past_sequence_length", 32,
    )  # fmt: skip
    metadata = graph_metadata(folder)
    assert metadata["source_manifest_sha256"] == sha256_file(source / "manifest.json")
    assert (metadata["method"], metadata["pattern"], metadata["sparsity"]) == ("magnitude", "2:4", "0.500000")
    assert metadata["base_model"].endswith("model")
    # The tied embedding is stored once: the file is no larger than the fp32 weights.
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters())
    assert (folder / "model.onnx.data").stat().st_size < 4 * weights + 65536


def test_inspect_counts_what_the_graph_stores(portable: tuple[Path, Path]) -> None:
    source, folder = portable
    rows = {row["name"]: row for row in inspect_onnx(folder)}
    records = verify(source).tensors
    assert len(records) == 14
    for name, record in records.items():
        assert (rows[name]["zeros"], rows[name]["pattern"], rows[name]["axis"]) == (record.zeros, "2:4", 0)
        assert rows[name]["shape"] == record.shape[::-1]
    assert rows["model.embed_tokens.weight"]["pattern"] is None


def test_a_graph_does_not_tell_the_commit_of_the_repository_that_the_environment_lies_in(tmp_path: Path) -> None:
    built = pytest.importorskip("onnxruntime_genai")
    export_checkpoint(pruned_model(tmp_path), tmp_path / "onnx", "onnx", options={"flavor": "genai"})
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    assert graph.producer_version == f"{built.__version__}+{built.__commit__[:7]}"


@pytest.mark.parametrize("flavor", ["portable", "genai"])
def test_inspect_names_the_pattern_of_the_manifest(tmp_path: Path, flavor: str) -> None:
    """Counting alone finds 7:8 or 12:16 in many a matrix of 16:32."""
    model = make_pico_llama(tmp_path / "model", torch.bfloat16)
    config, options = prune_config("magnitude", "16:32"), {"flavor": flavor}
    prune_and_export(resolve_model(str(model)), tmp_path / "out", config, None, formats=("onnx",), options=options)
    folder = tmp_path / "out" / "onnx"
    blocks = [row for row in inspect_onnx(folder) if "layers." in row["name"] and row["axis"] is not None]
    assert {(row["pattern"], row["pattern_from"]) for row in blocks} == {("16:32", "manifest")}
    (folder / "manifest.json").unlink()
    counted = {(row["pattern"], row["pattern_from"]) for row in inspect_onnx(folder) if row["pattern"]}
    assert ("16:32", "manifest") not in counted and {origin for _, origin in counted} == {"zeros"}


def test_a_lost_zero_is_noticed(portable: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = portable
    for path in folder.glob("model.onnx*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = next(each for each in graph.graph.initializer if each.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = np.memmap(
        tmp_path / place["location"], np.float32, "r+", int(place["offset"]), tuple(tensor.dims)
    )  # fmt: skip
    row = int(np.flatnonzero(data[:, 0] == 0)[0])
    data[row, 0] = 1.0
    data.flush()
    found = {row["name"]: row for row in inspect_onnx(tmp_path)}[name]
    assert found["pattern"] == "3:4"
    with pytest.raises(VerifyError, match=r"up_proj\.weight' does not hold 2:4"):
        recount(tmp_path, verify(source), "portable", "fp32")


def test_half_precision_is_compared_within_its_rounding(tmp_path: Path) -> None:
    record = as_portable(pruned_model(tmp_path), tmp_path / "onnx", "fp16")
    assert 1e-5 < record["parity"]["max_abs_logit_difference"] < 0.03
    assert record["sparsity"]["pattern_holds_in"] == record["sparsity"]["of"]
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    assert graph.graph.input[3].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_zeros_outlive_four_bits(tmp_path: Path) -> None:
    source = pruned_model(tmp_path)
    manifest = export_checkpoint(source, tmp_path / "onnx", "onnx", options={"flavor": "genai", "precision": "int4"})
    record, greedy = manifest.metrics["onnx"], manifest.metrics["greedy"]
    assert record["sparsity"]["pattern_holds_in"] == record["sparsity"]["of"] > 0
    assert record["sparsity"]["zeros"] >= sum(tensor.zeros for tensor in manifest.tensors.values())
    assert greedy["checkpoint_dtype"] == "int4" and "itself" in greedy["what"]
    kinds = {row["dtype"] for row in inspect_onnx(tmp_path / "onnx") if row["pattern"] == "2:4"}
    assert kinds == {"int4"}


def test_layers_of_different_widths(tmp_path: Path) -> None:
    source = pruned_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    mlp = model.model.layers[1].mlp
    for name, rows in (("gate_proj", True), ("up_proj", True), ("down_proj", False)):
        weight = getattr(mlp, name).weight
        sliced = nn.Linear(128, 192, bias=False) if rows else nn.Linear(192, 128, bias=False)
        sliced.weight = nn.Parameter((weight[:192] if rows else weight[:, :192]).detach().clone())
        setattr(mlp, name, sliced)
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    ids = [7, 100, 200, 30, 12, 9]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    write_graph(model, weights.__getitem__, tmp_path, torch.float32)
    assert np.abs(logits_of(tmp_path, [ids], [0])[0] - expected).max() < 1e-4


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    decoder = Decoder(pruned_model(tmp_path), "float32")
    model = decoder.model
    model.set_submodule(decoder.blocks_path, nn.ModuleList(decoder.blocks))
    model.model.norm.forward = torch.special.bessel_j0
    with pytest.raises(UnsupportedModel, match="bessel_j0"):
        write_graph(model, lambda name: decoder.reader.load(decoder.key(name)), tmp_path, torch.float32)


def test_a_graph_that_computes_something_else_is_kept_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pruned_model(tmp_path)

    def build_wrongly(dense: Path, folder: Path, precision: str) -> None:
        build_portable(dense, folder, precision)
        graph = onnx.load(folder / "model.onnx", load_external_data=False)
        tensor = next(each for each in graph.graph.initializer if each.name.endswith("1.mlp.up_proj.weight"))
        place = {entry.key: entry.value for entry in tensor.external_data}
        data = np.memmap(folder / place["location"], np.float32, "r+", int(place["offset"]), tuple(tensor.dims))
        data *= 1.01  # zeros stay zeros
        data.flush()

    monkeypatch.setattr(onnx_export, "build_portable", build_wrongly)
    with pytest.raises(ParityError, match=r"logits differ from the source's.*kept in .*onnx\.failed"):
        as_portable(source, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists() and not (tmp_path / "onnx.partial").exists()
    assert (tmp_path / "onnx.failed" / "model.onnx").is_file()
    assert not (tmp_path / "onnx.failed" / "manifest.json").exists()


def test_a_packed_source_is_unpacked_for_the_export(tmp_path: Path) -> None:
    source = pruned_model(tmp_path)
    export_checkpoint(source, tmp_path / "packed", "packed")
    record = as_portable(tmp_path / "packed", tmp_path / "onnx")
    assert "unpacked" in record["source"]
    check_record(record, "portable")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "onnx", "packed", "pruned"]


def test_damaged_folders_are_named(tmp_path: Path, portable: tuple[Path, Path]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff no graph")
    with pytest.raises(CheckpointError, match="no ONNX graph"):
        inspect_onnx(tmp_path)
    (tmp_path / "model.onnx").write_bytes((portable[1] / "model.onnx").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.onnx\.data is missing: it holds 'model"):
        inspect_onnx(tmp_path)


def test_the_command_line_from_a_model_to_a_graph(tmp_path: Path) -> None:
    model = make_pico(tmp_path / "model", CONFIGS["llama"])
    arguments = ["prune-and-export", str(model), "--out", str(tmp_path / "out"), "--method", "magnitude"]
    done = CliRunner().invoke(cli, [*arguments, "--format", "dense,onnx", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert report["formats"]["onnx"]["weight_file_bytes"] > report["formats"]["dense"]["weight_file_bytes"]
    done = CliRunner().invoke(cli, ["inspect", str(tmp_path / "out" / "onnx")], catch_exceptions=False)
    assert len([line for line in done.stdout.splitlines() if "2:4" in line and "50.00%" in line]) == 14
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "out" / "onnx")], catch_exceptions=False)
    assert done.exit_code == 0
