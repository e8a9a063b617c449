"""Units and budgets: real parameters, exactly, on the shapes of real models and on random ones."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_deploy.errors import ConfigError
from crepe_deploy.structural.plan import Geometry
from crepe_deploy.structural.units import (
    MOST_SPLITS,
    Units,
    even,
    levels,
    parameters,
    plan_budget,
    proportional,
    split_budgets,
    splits,
    spread,
    step_units,
    target_parameters,
)

SMOLLM2 = Geometry(hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536, layers=30)
LLAMA_1B = Geometry(hidden=2048, heads=32, kv_heads=8, head_dim=64, intermediate=8192, layers=16)


@st.composite
def models(draw: st.DrawFn) -> tuple[Units, float]:
    kv_heads, queries = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    geometry = Geometry(
        hidden=draw(st.integers(8, 64)),
        heads=kv_heads * queries,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 16])),
        intermediate=draw(st.integers(1, 16)) * 16,
        layers=draw(st.integers(1, 9)),
        qkv_bias=draw(st.booleans()),
    )
    attention = draw(st.sampled_from(["groups", "queries"]))
    return Units(geometry, draw(st.sampled_from([1, 4, 16])), attention), draw(st.floats(0.01, 0.95))


@settings(deadline=None, max_examples=300)
@given(models())
def test_budgets_are_exact_to_the_last_unit_that_fits(drawn: tuple[Units, float]) -> None:
    units, sparsity = drawn
    try:
        budget = plan_budget(units, sparsity)
    except ConfigError:
        least = units.geometry.layers * (units.attention_parameters + units.neuron_parameters)
        assert target_parameters(units.geometry, sparsity) < least + units.fixed_parameters
        return
    allocation = even(units, budget)
    kept = parameters(units.geometry, units.widths(allocation))
    assert kept == budget.kept <= budget.target
    whole = (units.geometry.layers * units.attention_count, units.geometry.layers * units.neuron_count)
    left = [
        size
        for size, count, most in zip(
            (units.attention_parameters, units.neuron_parameters),
            (budget.attention, budget.neurons),
            whole,
            strict=True,
        )
        if count < most
    ]
    assert left and budget.target - kept < min(left)
    assert min(allocation.attention) >= 1 and max(allocation.attention) <= units.attention_count
    assert min(allocation.neurons) >= 1 and max(allocation.neurons) <= units.neuron_count


@pytest.mark.parametrize("sparsity", [0.125, 0.25, 0.375, 0.5])
def test_real_shapes_hold_each_kind_near_its_own_share(sparsity: float) -> None:
    for geometry, multiple in ((SMOLLM2, 128), (SMOLLM2, 32), (LLAMA_1B, 128)):
        units = Units(geometry, multiple, "groups")
        budget = plan_budget(units, sparsity)
        attention = budget.attention / (geometry.layers * units.attention_count)
        neurons = budget.neurons / (geometry.layers * units.neuron_count)
        assert attention == pytest.approx(1 - sparsity, abs=1 / 24)
        assert neurons == pytest.approx(1 - sparsity, abs=1 / 24)


def test_parameters_are_those_of_the_matrices() -> None:
    units = Units(SMOLLM2, 128, "groups")
    assert SMOLLM2.parameters == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert units.attention_parameters == 64 * 576 * (2 + 2 * 3)
    assert units.neuron_parameters == 3 * 576 * 128
    assert Units(SMOLLM2, 128, "queries").attention_parameters == 3 * 2 * 64 * 576


def test_a_sparsity_that_leaves_too_little_names_the_most_that_is_possible() -> None:
    units = Units(SMOLLM2, 128, "groups")
    with pytest.raises(ConfigError, match=r"at most 0\.8") as refused:
        plan_budget(units, 0.95)
    most = float(str(refused.value).split("at most ")[1].split(" ")[0])
    assert plan_budget(units, most).attention == 30
    with pytest.raises(ConfigError):
        plan_budget(units, most + 0.002)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_sparsity_outside_zero_and_one_is_refused(sparsity: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        plan_budget(Units(SMOLLM2, 128, "groups"), sparsity)


def test_a_multiple_that_does_not_divide_is_refused_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match="96, 128"):
        Units(SMOLLM2, 100, "groups")


def test_spread_is_even_and_complete() -> None:
    for total in range(30, 91):
        found = spread(total, 30)
        assert sum(found) == total and max(found) - min(found) <= 1
    assert spread(45, 30)[:4] in ((1, 2, 1, 2), (2, 1, 2, 1))


def test_steps_halve_and_never_vanish() -> None:
    assert [step_units(48, iteration) for iteration in range(4)] == [6, 3, 2, 1]
    assert [step_units(3, iteration) for iteration in range(4)] == [1, 1, 1, 1]
    assert [step_units(64, iteration) for iteration in range(4)] == [8, 4, 2, 1]


def test_levels_keep_one_distance_and_stay_inside() -> None:
    assert levels(24, 6, 48) == (6, 12, 18, 24, 30, 36, 42, 48)
    assert levels(2, 1, 3) == (1, 2, 3)
    assert levels(30, 1, 48) == (26, 27, 28, 29, 30, 31, 32, 33, 34)
    for centre in range(1, 49):
        found = levels(centre, 6, 48)
        assert centre in found and {b - a for a, b in itertools.pairwise(found)} <= {6}


@pytest.mark.parametrize("sparsity", [0.125, 0.25, 0.5])
def test_splits_fill_the_budget_to_one_ffn_unit_a_layer(sparsity: float) -> None:
    target = target_parameters(SMOLLM2, sparsity)
    found = splits(SMOLLM2, 32, sparsity)
    assert len(found) == len(set(found))
    for width in found:
        kept = parameters(SMOLLM2, [width] * SMOLLM2.layers)
        assert kept <= target and target - kept < SMOLLM2.layers * (32 * 3 * 576 + 1)
    middle = proportional(SMOLLM2, found)
    share = middle.groups * SMOLLM2.group_parameters(middle.queries) / (3 * SMOLLM2.group_parameters())
    assert abs(share - middle.neurons / 1536) == min(
        abs(
            width.groups * SMOLLM2.group_parameters(width.queries) / (3 * SMOLLM2.group_parameters())
            - width.neurons / 1536
        )
        for width in found
    )


def test_no_split_is_said_so() -> None:
    with pytest.raises(ConfigError, match="no width that all layers can share"):
        splits(SMOLLM2, 1536, 0.75)


def test_attention_can_keep_another_share_of_the_same_budget() -> None:
    units = Units(SMOLLM2, 128, "queries")
    budget = plan_budget(units, 0.5, attention_share=0.667)
    assert budget.attention == 60 and plan_budget(units, 0.5).attention == 45
    assert 0 <= budget.target - budget.kept < min(units.attention_parameters, units.neuron_parameters)
    for wrong in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match="--attention-share"):
            plan_budget(units, 0.5, attention_share=wrong)


@settings(deadline=None, max_examples=200)
@given(models())
def test_splits_that_are_judged_fill_the_budget_and_a_share_gives_each_back(drawn: tuple[Units, float]) -> None:
    units, sparsity = drawn
    try:
        own = plan_budget(units, sparsity)
    except ConfigError:
        return
    found = split_budgets(units, sparsity)
    assert own in found and len(found) <= MOST_SPLITS
    assert [budget.attention for budget in found] == sorted({budget.attention for budget in found})
    for budget in found:
        assert plan_budget(units, sparsity, units.attention_share(budget)) == budget
        assert parameters(units.geometry, units.widths(even(units, budget))) == budget.kept <= budget.target


def test_the_splits_that_are_judged_on_real_shapes() -> None:
    queries = Units(SMOLLM2, 128, "queries")
    assert [budget.attention for budget in split_budgets(queries, 0.5)] == [30, 45, 60, 90]
    groups = split_budgets(Units(LLAMA_1B, 128, "groups"), 0.5)
    assert len(groups) == MOST_SPLITS and groups[0].attention == 16 and groups[-1].attention == 128
    assert 64 in [budget.attention for budget in groups]
