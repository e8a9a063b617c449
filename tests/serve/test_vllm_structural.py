"""vLLM serves layers of different widths: through the plugin, and without it in the DeciLM layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crepe_deploy.exporting.pipeline import export_checkpoint
from crepe_deploy.exporting.structural import assemble

from crepe_deploy.model.decoder import Decoder
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.structural.plan import Geometry
from tests.serve.test_vllm_plugin import GENERATE, PROMPTS, REFUSE, needs_vllm, python, transformers_tokens
from tests.structural.random_plans import Kept, make_model, random_plans

TOKENS = 32
KEPT: tuple[Kept, ...] = ((4, 2, 256), (2, 2, 64), (3, 1, 96), (1, 1, 200))
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
# vLLM's Gemma 2 has no output layer but the tied one, and transformers' SDPA leaves the soft cap on scores out.
GEMMA = {"tie_word_embeddings": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
OWN: dict[str, dict[str, Any]] = {"gemma2": {**GEMMA, "attn_logit_softcapping": None}, "gemma3_text": GEMMA, "phi3": {}}
STOCK = {"VLLM_PLUGINS": "lora_filesystem_resolver"}
pytestmark = [needs_vllm, pytest.mark.vllm]


def per_layer(root: Path, family: str) -> Path:
    """A random model with heads of 32 that vLLM's CPU attention serves, pruned unevenly."""
    model = make_model(root / "model", family, torch.float32, **SIZES, **OWN.get(family, {}))
    plans = random_plans(Geometry.from_config(Decoder(model).config), KEPT)
    assemble(resolve_model(str(model)), plans, root / "per-layer")
    return root / "per-layer"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One random Llama in both layouts."""
    root = tmp_path_factory.mktemp("structural")
    per_layer(root, "llama")
    export_checkpoint(root / "per-layer", root / "deci", "deci")
    return {name: root / name for name in ("per-layer", "deci")}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> list[list[int]]:
    """What transformers says, without a cache."""
    return transformers_tokens(folders["per-layer"], TOKENS)


@pytest.mark.parametrize("layout", ["per-layer", "deci"])
def test_vllm_says_what_transformers_says(layout: str, folders: dict[str, Path], expected: list[list[int]]) -> None:
    trusted = ["--trust-remote-code"] if layout == "deci" else []
    variables = STOCK if layout == "deci" else {}
    arguments = [str(folders[layout]), "1", json.dumps(PROMPTS), str(TOKENS), *trusted]
    done = python(str(GENERATE), *arguments, **variables)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-4000:]
    assert json.loads(lines[0].removeprefix("TOKENS ")) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


@pytest.mark.parametrize("family", OWN)
def test_vllm_says_what_transformers_says_of_other_families(tmp_path: Path, family: str) -> None:
    folder = per_layer(tmp_path, family)
    done = python(str(GENERATE), str(folder), "1", json.dumps(PROMPTS), str(TOKENS))
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-4000:]
    assert json.loads(lines[0].removeprefix("TOKENS ")) == transformers_tokens(folder, TOKENS)


def test_vllm_without_the_plugin_refuses_widths_per_layer(folders: dict[str, Path]) -> None:
    done = python("-c", REFUSE, str(folders["per-layer"]), **STOCK)
    assert done.returncode != 0 and "crepe_llama" in done.stderr
