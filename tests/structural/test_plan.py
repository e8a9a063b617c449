"""Plans refuse what no layer can be; parameter counts are those of real models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from crepe_deploy.errors import ConfigError, UnsupportedModel
from crepe_deploy.structural.plan import Geometry, LayerPlan, head_features
from tests.structural.random_plans import CONFIGS, family_config, random_plans

GEOMETRY = Geometry(hidden=64, heads=8, kv_heads=4, head_dim=8, intermediate=96, layers=3)


def a_plan(**changes: Any) -> LayerPlan:
    """Groups 0 and 2 with their second query heads, three neurons; `changes` on top."""
    given: dict[str, Any] = {
        "groups": (0, 2),
        "queries": ((1,), (1,)),
        "neurons": (0, 5, 9),
        "o_proj": torch.zeros(64, 16),
        "down_proj": torch.zeros(64, 3),
    }
    return LayerPlan(**{**given, **changes})


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("biases", [False, True])
def test_parameters_are_those_of_the_model(family: str, biases: bool) -> None:
    options = {"attention_bias": biases, "mlp_bias": biases} if family == "llama" else {}
    config = family_config(family, **options)
    geometry = Geometry.from_config(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    prunable = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "_proj." in name and not name.endswith(("o_proj.bias", "down_proj.bias"))
    )
    assert geometry.parameters == prunable
    assert geometry.qkv_bias == (family == "qwen2" or (biases and family == "llama"))


def test_a_head_size_that_is_not_stated_is_derived() -> None:
    geometry = Geometry.from_config(LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2))
    assert (geometry.head_dim, geometry.queries_per_group) == (16, 2)


def test_parameters_of_a_plan_are_the_sum_of_its_units() -> None:
    plan = a_plan()
    assert plan.widths == (2, 2, 3)
    assert plan.parameters(GEOMETRY) == 2 * (8 * 2 * 64) + 2 * (2 * 8 * 64) + 3 * (3 * 64)
    everything = random_plans(GEOMETRY, [(4, 2, 96)] * 3)
    assert sum(found.parameters(GEOMETRY) for found in everything) == GEOMETRY.parameters


def test_features_follow_kept_heads_group_by_group() -> None:
    plan = a_plan(queries=((1,), (0,)))
    assert plan.kept_heads(GEOMETRY) == (1, 4)
    assert plan.query_features(GEOMETRY).tolist() == [*range(8, 16), *range(32, 40)]
    assert plan.key_value_features(GEOMETRY).tolist() == [*range(8), *range(16, 24)]
    assert head_features([2, 0], 3).tolist() == [6, 7, 8, 0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"groups": (), "queries": ()}, "groups: none is kept"),
        ({"groups": (2, 0)}, "must ascend"),
        ({"groups": (1, 1)}, "must ascend"),
        ({"groups": (-1, 0)}, "must ascend"),
        ({"queries": ((1,),)}, "2 KV groups are kept, with query heads for 1"),
        ({"queries": ((0,), (0, 1))}, "1, 2 query heads"),
        ({"queries": ((0,), ())}, "query heads of group 2: none"),
        ({"neurons": ()}, "neurons: none is kept"),
        ({"o_proj": torch.zeros(64, 15)}, "15 columns for 2 kept query heads"),
        ({"o_proj": torch.zeros(32, 16)}, "32 rows"),
        ({"o_proj": torch.zeros(64)}, "matrices"),
        ({"down_proj": torch.zeros(64, 4)}, "4 columns for 3 kept neurons"),
    ],
)
def test_what_no_layer_can_be_is_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        a_plan(**changes)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"groups": (0, 4)}, "KV group 4 is kept, and the layer has 4"),
        ({"queries": ((1,), (2,))}, "query head within its group 2"),
        ({"neurons": (0, 5, 96)}, "FFN neuron 96"),
        ({"o_proj": torch.zeros(64, 18)}, r"the kept heads need \(64, 16\)"),
        ({"o_proj": torch.zeros(32, 16), "down_proj": torch.zeros(32, 3)}, "o_proj has shape"),
    ],
)
def test_what_this_model_has_not_is_refused(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        a_plan(**changes).check(GEOMETRY)
    a_plan().check(GEOMETRY)


def test_geometries_that_cannot_be_pruned_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="7 query heads do not divide into 2"):
        replace(GEOMETRY, heads=7, kv_heads=2)
    with pytest.raises(ConfigError, match="layers = 0"):
        replace(GEOMETRY, layers=0)
    with pytest.raises(UnsupportedModel, match=r"gpt2.*no single 'intermediate_size'"):
        Geometry.from_config(GPT2Config())
