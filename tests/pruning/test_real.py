"""The real model through the real command: pruned, reopened by unmodified transformers, and still a language model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.proof import walk_logits
from crepe_deploy.texts import load_tokenizer, tokenize

pytestmark = pytest.mark.real

SETTINGS = ["--calib-samples", "8", "--calib-length", "256", "--seed", "0", "--format", "dense", "--json"]


def crepe(*arguments: Any) -> Any:
    command = [sys.executable, "-m", "crepe_deploy", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@pytest.fixture(scope="module")
def pruned(smollm2: Path, assets_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """SmolLM2 pruned with CRePE: pattern -> exported folder."""
    root = tmp_path_factory.mktemp("real")
    folders = {}
    for pattern in ("2:4", "16:32"):
        out = root / pattern.replace(":", "of")
        arguments = ["--out", out, "--sparsity", pattern, "--calib", assets_dir / "c4.train.txt", *SETTINGS]
        report = crepe("prune-and-export", smollm2, *arguments)
        assert report["pruned_tensors"] == 210
        assert report["sparsity_of_pruned_tensors"] == pytest.approx(0.5, abs=1e-4)
        assert report["parity"]["max_abs_logit_difference"] <= report["parity"]["tolerance"]
        folders[pattern] = out / "dense"
    return folders


def test_unmodified_transformers_computes_the_same(pruned: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(pruned["16:32"])
    tokens = tokenize(tokenizer, "The quick brown fox jumps over the lazy dog and runs into the forest.")[None]
    with torch.inference_mode():
        stock = AutoModelForCausalLM.from_pretrained(pruned["16:32"], dtype=torch.float32).eval()(tokens).logits
    walked = walk_logits(Decoder(pruned["16:32"], "float32"), tokens)
    torch.testing.assert_close(walked, stock, atol=1e-3, rtol=1e-4)


def test_the_wider_group_keeps_more(pruned: dict[str, Path], smollm2: Path, assets_dir: Path) -> None:
    arguments = ["--text", assets_dir / "wiki.test.txt", "--window", 512, "--max-tokens", 2048, "--against", smollm2]
    quality = {pattern: crepe("eval", folder, *arguments, "--json") for pattern, folder in pruned.items()}
    dense = quality["2:4"]["paired"]["reference_perplexity"]["value"]
    perplexity = {pattern: result["perplexity"]["value"] for pattern, result in quality.items()}
    assert dense < perplexity["16:32"] < perplexity["2:4"] < 15 * dense
    assert quality["16:32"]["paired"]["kl_mean"]["high"] < quality["2:4"]["paired"]["kl_mean"]["low"]


def test_gguf_source_is_dequantised_and_said_so(assets_dir: Path, tmp_path: Path) -> None:
    gguf = next(assets_dir.glob("*.gguf"))
    command = [sys.executable, "-m", "crepe_deploy", "prune", str(gguf), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([*command, "--method", "magnitude"], check=True, env=environment)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["kind"] == "gguf"
    assert manifest["source"]["notes"]["weights"].startswith("dequantised")
