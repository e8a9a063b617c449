"""Structurally pruned models as ONNX graphs: every layer of the graph as narrow as the checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from crepe_deploy.exporting.onnx.support import OnnxOptions
from crepe_deploy.exporting.pipeline import export_checkpoint
from crepe_deploy.exporting.structural import assemble
from crepe_deploy.serve.ort import greedy, load_runner

from crepe_deploy.errors import UnsupportedModel
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.store.manifest import verify
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.structural.plan import Geometry
from tests.structural.random_plans import UNEVEN, Kept, make_model, random_plans

EVEN: tuple[Kept, ...] = ((2, 2, 32),) * 3


def sliced(folder: Path, family: str, kept: tuple[Kept, ...], widths: Any, **overrides: Any) -> Path:
    model = make_model(folder / "model", family, **overrides)
    plans = random_plans(Geometry.from_config(Decoder(model).config), kept, 0)
    assemble(resolve_model(str(model)), plans, folder / "sliced", widths=widths)
    return folder / "sliced"


@pytest.mark.parametrize(
    ("family", "kept", "widths"),
    [
        ("llama", EVEN, "uniform"),
        ("llama", UNEVEN, "per-layer"),
        ("qwen3", UNEVEN, "per-layer"),
        ("gemma3_text", UNEVEN, "per-layer"),
    ],
)
def test_the_graph_says_what_the_smaller_model_says(
    tmp_path: Path, family: str, kept: tuple[Kept, ...], widths: Any
) -> None:
    source = sliced(tmp_path, family, kept, widths)
    out = tmp_path / "onnx"
    parity = export_checkpoint(source, out, "onnx").metrics["onnx"]["parity"]
    assert parity["max_abs_logit_difference"] < 1e-4
    assert all(run["greedy_agreed"] == run["greedy_total"] >= 64 for run in parity["runs"].values())
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    heads = [
        value.type.tensor_type.shape.dim[1].dim_value for value in graph.input if value.name.endswith(".key")
    ]  # fmt: skip
    assert heads == [groups for groups, _, _ in kept]
    recorded = verify(out).metrics["greedy"]
    prompt, tokens = recorded["prompt_token_ids"], recorded["token_ids"]
    assert greedy(load_runner(out, len(prompt) + len(tokens)), [prompt], len(tokens))[0] == [tokens]


def test_genai_takes_widths_that_all_layers_share(tmp_path: Path) -> None:
    source = sliced(tmp_path, "llama", EVEN, "uniform", head_dim=16)
    found = export_checkpoint(source, tmp_path / "onnx", "onnx", onnx=OnnxOptions("genai", "fp32")).metrics["onnx"]
    assert found["parity"]["max_abs_logit_difference"] < 1e-4
    assert all(run["greedy_agreed"] == run["greedy_total"] >= 64 for run in found["parity"]["runs"].values())


def test_genai_needs_heads_of_sixteen(tmp_path: Path) -> None:
    source = sliced(tmp_path, "llama", EVEN, "uniform", head_dim=8)
    with pytest.raises(UnsupportedModel, match=r"multiple of 16, and these have 8; use portable"):
        export_checkpoint(source, tmp_path / "onnx", "onnx", onnx=OnnxOptions("genai", "fp32"))
    assert not (tmp_path / "onnx").exists()


def test_genai_has_one_width_for_all_layers(tmp_path: Path) -> None:
    source = sliced(tmp_path, "llama", UNEVEN, "per-layer")
    with pytest.raises(UnsupportedModel, match=r"crepe_llama.*one width; use portable"):
        export_checkpoint(source, tmp_path / "onnx", "onnx", onnx=OnnxOptions("genai", "fp32"))
    assert not (tmp_path / "onnx").exists()
