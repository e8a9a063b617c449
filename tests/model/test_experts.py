"""Layers with experts are read as files hold them and walked block by block, one in memory at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from crepe_deploy.errors import CheckpointError, UnsupportedModel
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.proof import walk_logits
from tests.pico import VOCAB
from tests.pico_moe import FAMILIES, fuse, make_moe

TOKENS = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", FAMILIES)
def test_the_walk_computes_what_transformers_does(tmp_path: Path, layout: str) -> None:
    folder = make_moe(tmp_path / "moe", layout)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.inference_mode():
        stock = model(input_ids=TOKENS, use_cache=False).logits
    walked = walk_logits(Decoder(folder, experts=True), TOKENS)
    torch.testing.assert_close(walked, stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", FAMILIES)
def test_a_block_is_one_memory_with_the_tensors_of_the_files(tmp_path: Path, layout: str) -> None:
    folder = make_moe(tmp_path / "moe", layout, torch.bfloat16)
    decoder, stored = Decoder(folder, experts=True), load_file(folder / "model.safetensors")
    with decoder.block(1) as (block, weights):
        assert sorted(weights) == sorted(decoder.block_keys(1))
        for key, tensor in weights.items():
            assert torch.equal(tensor, stored[key])
            tensor.zero_()
        assert all(not parameter.any() for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in block.parameters())
    for name, buffer in block.named_buffers():
        assert buffer.dtype == torch.float32 or "score" not in name


def test_files_may_hold_experts_fused_as_well(tmp_path: Path) -> None:
    folder = make_moe(tmp_path / "moe")
    expected = walk_logits(Decoder(folder, experts=True), TOKENS)
    fuse(folder)
    assert torch.equal(walk_logits(Decoder(folder, experts=True), TOKENS), expected)


def test_files_and_configuration_that_disagree_are_refused(tmp_path: Path) -> None:
    folder = make_moe(tmp_path / "moe")
    path = folder / "model.safetensors"
    whole = load_file(path)
    for name, change in (
        ("model.layers.1.mlp.experts.3.up_proj.weight", None),
        ("model.layers.1.mlp.experts.8.gate_proj.weight", torch.zeros(32, 64)),
        ("model.layers.1.mlp.experts.3.up_proj.weight", torch.zeros(16, 64)),
        ("model.layers.1.mlp.gate.weight", torch.zeros(7, 64)),
    ):
        weights = {key: tensor for key, tensor in whole.items() if key != name}
        save_file(weights if change is None else {**weights, name: change}, path)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            Decoder(folder, experts=True)
    corrected = make_moe(tmp_path / "glm", "glm4_moe")
    weights = load_file(corrected / "model.safetensors")
    del weights["model.layers.2.mlp.gate.e_score_correction_bias"]
    save_file(weights, corrected / "model.safetensors")
    with pytest.raises(CheckpointError, match="e_score_correction_bias"):
        Decoder(corrected, experts=True)


def test_what_prunes_no_experts_refuses_them_and_names_what_does(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"MixtralTopKRouter.*`crepe-deploy experts`"):
        Decoder(make_moe(tmp_path / "moe", "mixtral"))
