"""The matrices inside experts, and what each expert reads: as hooks on a whole model by stock transformers see it."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from crepe_deploy.errors import NumericalError
from crepe_deploy.model import inside
from crepe_deploy.model.blocks import expert_layer
from crepe_deploy.model.calibrate import Stream, embed
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.inside import Routed, expert_matrices, matrices
from tests.moe.reference import neurons
from tests.pico import VOCAB
from tests.pico_moe import FAMILIES, fuse, make_moe

TOKENS = torch.randint(3, VOCAB, (4, 48), generator=torch.Generator().manual_seed(0))
NEEDS = frozenset({"hessian", "col_norm", "moments"})


def given(folder: Path, index: int) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The experts of a block of the whole model, and what they are given: hidden states, choices, weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    experts, seen = model.model.layers[index].mlp.experts, []
    experts.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.inference_mode():
        model(input_ids=TOKENS, use_cache=False)
    return experts, *seen[0]


def routed(decoder: Decoder, index: int, stream: Stream) -> tuple[Any, Routed]:
    assert decoder.experts is not None
    for before in range(index):
        with decoder.block(before) as (block, _):
            stream.run(block, before, advance=True)
    block = decoder.blocks[index]
    layer = expert_layer(block, decoder.experts)
    assert layer is not None
    return layer[1], Routed(NEEDS, torch.device("cpu"))


@pytest.mark.parametrize("layout", [*FAMILIES, "fused"])
def test_each_expert_reads_the_tokens_routed_to_it(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crepe_deploy.model.calibrate.BATCH_TOKENS", 96)  # several micro-batches
    folder = fuse(make_moe(tmp_path / "moe")) if layout == "fused" else make_moe(tmp_path / "moe", layout)
    decoder = Decoder(folder, experts=True)
    stock, hidden, chosen, weights = given(folder, 1)
    counts = torch.bincount(chosen.flatten(), minlength=8)
    bound = int(counts.sort().values[1]) + 1  # one or two experts have fewer
    monkeypatch.setattr(inside, "FEWEST_TOKENS", bound)
    (stream,) = embed(decoder, [TOKENS])
    experts, noted = routed(decoder, 1, stream)
    with decoder.block(1) as (block, _):
        with noted.watching(experts):
            stream.run(block, 1, advance=True)
        for expert, specs in groupby(expert_matrices(decoder, 1), key=lambda spec: spec.expert):
            assert expert is not None
            read = noted.of(expert, experts)
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            assert read.tokens == len(rows) and read.spread == (len(rows) < bound)
            own = hidden if read.spread else hidden[rows]
            counted = torch.ones(len(own), 1) if read.spread else weights[rows, places].unsqueeze(1)
            between = neurons(stock, expert, own)
            for spec in specs:
                stats = read.stats(spec, len(TOKENS))
                expected = (between if spec.path.endswith("down_proj") else own) * counted
                assert stats.hessian is not None and stats.col_norm is not None and stats.total is not None
                close(stats.hessian, 2 / len(TOKENS) * expected.T @ expected)
                close(stats.col_norm, (expected.square().sum(0) / len(TOKENS)).sqrt())
                close(stats.total, expected.sum(0) / len(TOKENS))


def close(found: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-4, rtol=1e-4)


def test_an_expert_whose_neurons_are_silent_is_named(tmp_path: Path) -> None:
    decoder = Decoder(make_moe(tmp_path / "moe"), experts=True)
    (stream,) = embed(decoder, [TOKENS])
    experts, noted = routed(decoder, 0, stream)
    with decoder.block(0) as (block, _):
        experts.gate_up_proj[3].zero_()
        with noted.watching(experts):
            stream.run(block, 0, advance=True)
        last = expert_matrices(decoder, 0)[3 * 3 + 2]
        with pytest.raises(NumericalError, match=r"experts\.3\.down_proj\.weight are zero"):
            noted.of(3, experts).stats(last, len(TOKENS))


@pytest.mark.parametrize("layout", [*FAMILIES, "fused"])
def test_a_matrix_is_one_memory_with_files_and_block(tmp_path: Path, layout: str) -> None:
    folder = fuse(make_moe(tmp_path / "moe")) if layout == "fused" else make_moe(tmp_path / "moe", layout)
    decoder = Decoder(folder, experts=True)
    with decoder.block(1) as (block, weights):
        specs = expert_matrices(decoder, 1)
        assert len(specs) == len({spec.key for spec in specs}) == 8 * (2 if layout in ("gpt_oss", "fused") else 3)
        assert {spec.tensor for spec in specs} <= weights.keys()
        for number, spec in enumerate(specs):
            weight = spec.of(weights)
            assert weight.shape == (spec.out_features, spec.in_features)
            weight.fill_(number)
            assert bool((spec.computed(block) == number).all())
        experts = block.mlp.experts
        assert not any((one == 0).any() for one in (experts.gate_up_proj[1:], experts.down_proj))
    assert not expert_matrices(Decoder(make_moe(tmp_path / "glm", "glm4_moe"), experts=True), 0)  # a dense block


def test_gates_of_shared_experts_and_routers_are_left_whole(tmp_path: Path) -> None:
    decoder = Decoder(make_moe(tmp_path / "moe", "qwen2_moe"), experts=True)
    names = [spec.key for spec in matrices(decoder, 1)]
    assert not [name for name in names if "shared_expert_gate" in name or ".gate." in name]
    assert any("shared_expert.gate_proj" in name for name in names)
