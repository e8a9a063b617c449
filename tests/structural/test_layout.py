"""Configurations of every layout: what they say, what they promise, what they refuse; padding keeps what was there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_deploy.errors import CheckpointError, ConfigError, UnsupportedModel
from crepe_deploy.model.structure import SEPARATE
from crepe_deploy.structural import layout
from crepe_deploy.structural.layout import Widths
from crepe_deploy.structural.slicing import in_layer, padded, sized
from tests.mutations import mutations, refusal

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "rope_theta": 5e5,
    "bos_token_id": 7,
}
HEAD_DIM = 8


@st.composite
def layers(draw: st.DrawFn) -> list[Widths]:
    """One to six layers of up to 8 KV heads with up to 4 query heads each."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        groups, queries, neurons = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 300))
        found.append(Widths(groups * queries, groups, neurons))
    return found


@given(layers())
@settings(deadline=None)
def test_per_layer_configurations_state_the_widths(widths: list[Widths]) -> None:
    content = {**LLAMA, "num_hidden_layers": len(widths)}
    written = layout.per_layer_content(content, HEAD_DIM, widths, 4)
    assert layout.layer_widths(written) == widths and layout.is_per_layer(written)
    for shapes, layer in zip(layout.layer_shapes(written), widths, strict=True):
        assert shapes["self_attn.o_proj.weight"] == (64, layer.heads * HEAD_DIM)
        assert shapes["self_attn.v_proj.weight"] == (layer.kv_heads * HEAD_DIM, 64)
        assert shapes["mlp.down_proj.weight"] == (64, layer.intermediate)


@given(layers())
@settings(deadline=None, max_examples=50)
def test_decilm_layers_have_one_head_count_and_room_for_every_head(widths: list[Widths]) -> None:
    target = layout.deci_widths(widths)
    assert len({layer.heads for layer in target}) == 1
    for layer, found in zip(widths, target, strict=True):
        assert found.heads % found.kv_heads == 0 and found.intermediate == layer.intermediate
        assert found.kv_heads >= layer.kv_heads
        assert found.heads // found.kv_heads >= layer.heads // layer.kv_heads
    written = layout.deci_content({**LLAMA, "num_hidden_layers": len(widths)}, HEAD_DIM, target)
    assert layout.layer_widths(written) == target and layout.layer_shapes(written)
    if len(set(widths)) == 1:
        assert target == widths


@given(layers(), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_padding_adds_zeros_around_every_head(widths: list[Widths], pick: int) -> None:
    index = pick % len(widths)
    layer, target = widths[index], layout.deci_widths(widths)[index]
    queries, wanted = layer.heads // layer.kv_heads, target.heads // target.kv_heads
    q = torch.randn(layer.heads * HEAD_DIM, 5)
    grown = padded("self_attn.q_proj.weight", q, layer, target, HEAD_DIM)
    assert torch.equal(padded("self_attn.o_proj.weight", q.T, layer, target, HEAD_DIM), grown.T)
    assert torch.equal(padded("self_attn.q_proj.bias", q[:, 0], layer, target, HEAD_DIM), grown[:, 0])
    for head in range(target.heads):
        group, query = divmod(head, wanted)
        rows = grown[head * HEAD_DIM : (head + 1) * HEAD_DIM]
        if group < layer.kv_heads and query < queries:
            source = (group * queries + query) * HEAD_DIM
            assert torch.equal(rows, q[source : source + HEAD_DIM])
        else:
            assert not rows.any()
    k = torch.randn(layer.kv_heads * HEAD_DIM, 5)
    keys = padded("self_attn.k_proj.weight", k, layer, target, HEAD_DIM)
    assert torch.equal(keys[: len(k)], k) and not keys[len(k) :].any()
    assert keys.shape == sized("self_attn.k_proj.weight", (999, 5), target, HEAD_DIM, SEPARATE)
    assert grown.shape == sized("self_attn.q_proj.weight", (999, 5), target, HEAD_DIM, SEPARATE)


def test_names_belong_to_layers_or_to_none() -> None:
    assert in_layer("model.layers.12.self_attn.q_proj.weight") == (12, "self_attn.q_proj.weight")
    assert in_layer("layers.0.mlp.down_proj.bias") == (0, "mlp.down_proj.bias")
    assert in_layer("model.embed_tokens.weight") is None and in_layer("lm_head.weight") is None


def test_a_uniform_llama_that_transformers_refuses_is_written_as_mistral() -> None:
    widths = [Widths(6, 3, 40)] * 3
    written = layout.uniform_content({**LLAMA, "mlp_bias": False}, HEAD_DIM, widths)
    assert (written["model_type"], written["sliding_window"]) == ("mistral", None) and "mlp_bias" not in written
    assert written["rope_theta"] == 5e5 and layout.layer_widths(written) == widths
    with pytest.raises(ConfigError, match="6 heads with biases at hidden size 64"):
        layout.uniform_content({**LLAMA, "attention_bias": True}, HEAD_DIM, widths)


def test_a_uniform_qwen2_with_fewer_heads_is_written_as_llama() -> None:
    qwen = {**LLAMA, "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 99, "max_window_layers": 3}
    written = layout.uniform_content(qwen, HEAD_DIM, [Widths(4, 2, 40)] * 3)
    assert written["model_type"] == "llama" and written["attention_bias"] and layout.has_zero_o_bias(qwen, written)
    assert "sliding_window" not in written and (written["bos_token_id"], written["eos_token_id"]) == (7, None)
    whole = layout.uniform_content(qwen, HEAD_DIM, [Widths(8, 4, 40)] * 3)
    assert whole["model_type"] == "qwen2" and not layout.has_zero_o_bias(qwen, whole)
    with pytest.raises(ConfigError, match="6 heads, which do not divide hidden size 64"):
        layout.uniform_content(qwen, HEAD_DIM, [Widths(6, 3, 40)] * 3)
    with pytest.raises(ConfigError, match="a sliding window"):
        layout.uniform_content({**qwen, "use_sliding_window": True}, HEAD_DIM, [Widths(4, 2, 40)] * 3)


@pytest.mark.parametrize("name", ["opt", "gemma3", "crepe_llama", "nemotron-nas"])
def test_other_families_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{name}'"):
        layout.check_family({"model_type": name})


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": None},
        {"num_hidden_layers": "three"},
        {"per_layer_config": {"3": {"intermediate_size": 4}}},
        {"per_layer_config": ["x"]},
        {"per_layer_config": {"0": {"intermediate_size": "wide"}}},
        {"model_type": "nemotron-nas", "block_configs": [{"attention": {"n_heads_in_group": 0}}]},
        {"hidden_size": None},
    ],
)
def test_configurations_without_widths_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        layout.layer_shapes({**LLAMA, **change})


WIDTHS = [Widths(8, 4, 96), Widths(4, 2, 64), Widths(4, 2, 32)]


@pytest.mark.parametrize("written", [
    LLAMA, layout.per_layer_content(LLAMA, HEAD_DIM, WIDTHS, 4),
    layout.deci_content(LLAMA, HEAD_DIM, layout.deci_widths(WIDTHS)),
])  # fmt: skip
def test_a_configuration_spoilt_anywhere_states_widths_or_is_refused(written: dict[str, Any]) -> None:
    for change, document in mutations(written):
        if isinstance(document, dict):
            refusal(change, lambda document=document: layout.layer_shapes(document))  # type: ignore[misc]
