"""A stored output layer that config.json calls tied: every format computes what plain transformers does with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crepe_deploy.exporting.onnx.parity import greedy, load_runner
from transformers import AutoModelForCausalLM

from crepe_deploy.cli import run
from crepe_deploy.quality.perplexity import evaluate
from crepe_deploy.store.checkpoint import CheckpointReader, same_bits
from crepe_deploy.texts import load_tokenizer
from tests.field.heads import EMBEDDING, HEAD, head_alone, own_head
from tests.pico import sample_text


@pytest.fixture(scope="module", params=[own_head, head_alone])
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a folder, pruned."""
    root = tmp_path_factory.mktemp("head")
    assert run(["prune", str(request.param(root)), "--method", "magnitude", "--out", str(root / "pruned")]) == 0
    return root / "pruned"


def continued(folder: Path, prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """The greedy tokens and the logits of the last place, by plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, logits = list(prompt), []
    with torch.inference_mode():
        for _ in range(count):
            logits.append(model(torch.tensor([tokens])).logits[0, -1].numpy())
            tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], np.stack(logits)


def exported(pruned: Path, out: Path, *options: str) -> dict[str, Any]:
    assert run(["export", str(pruned), "--out", str(out), *options]) == 0
    recorded: dict[str, Any] = json.loads((out / "manifest.json").read_text())["metrics"].get("greedy", {})
    return recorded


@pytest.mark.parametrize("format", ["dense", "packed", "int8"])
def test_folders_are_what_transformers_reads(pruned: Path, tmp_path: Path, format: str) -> None:
    recorded = exported(pruned, tmp_path / "out", "--format", format)
    if format == "int8":
        source, out = CheckpointReader(pruned), CheckpointReader(tmp_path / "out")
        assert all(same_bits(source.load(name), out.load(name)) for name in {HEAD, EMBEDDING} & source.tensors.keys())
        return
    tokens, logits = continued(pruned, recorded["prompt_token_ids"], len(recorded["token_ids"]))
    assert recorded["token_ids"] == tokens
    _, again = continued(tmp_path / "out", recorded["prompt_token_ids"], len(tokens))
    assert np.abs(again - logits).max() < 1e-4


@pytest.mark.parametrize("flavor", ["portable", "genai"])
def test_graphs_compute_what_transformers_does(pruned: Path, tmp_path: Path, flavor: str) -> None:
    recorded = exported(pruned, tmp_path / "out", "--format", "onnx", "--onnx-flavor", flavor)
    prompt, count = recorded["prompt_token_ids"], len(recorded["token_ids"])
    tokens, logits = continued(pruned, prompt, count)
    assert recorded["token_ids"] == tokens
    found, steps = greedy(load_runner(tmp_path / "out", len(prompt) + count), [prompt], count)
    assert found[0] == tokens and np.abs(np.stack(steps, axis=1)[0] - logits).max() < 1e-3


def test_pruning_keeps_it_and_eval_measures_it(pruned: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(sample_text(200))
    model = AutoModelForCausalLM.from_pretrained(pruned)
    source = AutoModelForCausalLM.from_pretrained(pruned.parent / "m")
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    assert torch.equal(model.get_input_embeddings().weight, source.get_input_embeddings().weight)
    report = evaluate(pruned, text, window=32, max_tokens=33, bos="none")
    ids = load_tokenizer(pruned)(text.read_text(), return_tensors="pt").input_ids[:, :32]
    loss = float(model(ids, labels=ids).loss.detach())
    assert report.perplexity.value == pytest.approx(np.exp(loss), rel=1e-4)
