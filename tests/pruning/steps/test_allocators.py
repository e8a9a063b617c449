"""Allocation: the published rules against slow loops, and budgets that hold to the weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.stats import Stats
from crepe_deploy.pruning.steps.allocators import (
    ALLOCATORS,
    Alpha,
    Error,
    Owl,
    Unit,
    error_curve,
    fit_levels,
    power_law_exponent,
)


def blocks(count: int = 5, seed: int = 0) -> list[list[list[tuple[Tensor, Stats]]]]:
    """For each block two units: one of two layers (8, 32) and (4, 32), one of a layer (32, 64); tails differ."""
    generator = torch.Generator().manual_seed(seed)

    def made(rows: int, columns: int, tail: float) -> tuple[Tensor, Stats]:
        weight = torch.randn(rows, columns, generator=generator)
        weight = weight.sign() * weight.abs() ** tail
        return weight, Stats(col_norm=torch.rand(columns, generator=generator) + 0.1)

    tails = [1 + 0.4 * index for index in range(count)]
    return [[[made(8, 32, tail), made(4, 32, tail)], [made(32, 64, 1.0)]] for tail in tails]


def units(count: int = 5, levels: int = 32) -> list[Unit]:
    made = []
    for block in range(count):
        made += [Unit(block, ("a", "b"), 12 * 32, levels), Unit(block, ("c",), 32 * 64, levels)]
    return made


def test_owl_is_its_formula() -> None:
    found, model = Owl(threshold=3.0, spread=0.1), blocks()
    seen = [found.observe(block, [32, 32]) for block in model]
    slow = []
    for block in model:
        scores = [
            float(weight[i, j].abs() * stats.col_norm[j])
            for unit in block
            for weight, stats in unit
            if stats.col_norm is not None
            for i in range(len(weight))
            for j in range(weight.shape[1])
        ]
        mean = sum(scores) / len(scores)
        slow.append(100 * sum(score > 3.0 * mean for score in scores) / len(scores))
    assert seen == pytest.approx(slow)
    fractions = found.fractions(seen, units(), 0.4)
    scaled = [(value - min(slow)) / (max(slow) - min(slow)) * 0.2 for value in slow]
    for unit, fraction in zip(units(), fractions, strict=True):
        assert fraction == pytest.approx(0.4 + scaled[unit.block] - sum(scaled) / len(scaled))


def test_alpha_is_its_formula() -> None:
    seen = [2.0, 4.0, 3.0, 2.5, 3.5]
    fractions = Alpha(spread=0.3).fractions(seen, units(), 0.4)
    ratios = [0.7 + (value - 2) / 2 * 0.6 for value in seen]
    scale = sum(unit.size for unit in units()) / sum(unit.size * ratios[unit.block] for unit in units())
    for unit, fraction in zip(units(), fractions, strict=True):
        assert 1 - fraction == pytest.approx(0.6 * ratios[unit.block] * scale)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.5])
def test_a_power_law_spectrum_gives_its_exponent(exponent: float) -> None:
    count = 400
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    values = (1 - quantiles) ** (-1 / (exponent - 1))
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(count, count, generator=generator).double())[0] for _ in range(2))
    assert power_law_exponent(left * values.sqrt() @ right) == pytest.approx(exponent, rel=0.1)


def test_the_error_curve_is_the_output_error_of_uncorrelated_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, norm = torch.randn(4, 32, generator=generator), torch.rand(32, generator=generator) + 0.1
    curve = error_curve(weight, Stats(col_norm=norm), 8)
    for keep in range(9):
        score = (weight.abs() * norm).view(4, 4, 8)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, score.topk(keep).indices, True)
        left = (score.square() * ~kept).sum() / score.square().sum()
        assert float(curve[keep]) == pytest.approx(float(left), abs=1e-6)


def test_error_gives_to_the_unit_whose_error_it_lowers_most() -> None:
    model, made = blocks(), units()
    rule = Error(spread=0.3)
    seen = [rule.observe(block, [32, 32]) for block in model]
    fractions = rule.fractions(seen, made, 0.5)
    kept = sum(fraction * unit.size for fraction, unit in zip(fractions, made, strict=True))
    assert kept <= 0.5 * sum(unit.size for unit in made) * (1 + 1e-9)
    curves = [curve for block in seen for curve in block]

    def total(chosen: list[float]) -> float:
        return sum(float(curve[round(value * 32)]) for curve, value in zip(curves, chosen, strict=True))

    assert total(fractions) < total([0.5] * len(made))
    for first in range(len(made)):
        for second in range(len(made)):
            if made[first].size == made[second].size and first != second:
                moved = list(fractions)
                moved[first] += 1 / 32
                moved[second] -= 1 / 32
                if max(abs(value - 0.5) for value in moved) <= 0.3:
                    assert total(moved) >= total(fractions) - 1e-9


@pytest.mark.parametrize("name", ALLOCATORS)
def test_equal_blocks_are_treated_alike(name: str) -> None:
    block = blocks(1)[0]
    rule = ALLOCATORS[name]()
    seen = [rule.observe(block, [32, 32]) for _ in range(3)]
    fractions = rule.fractions(seen, units(3), 0.5)
    assert fractions[:2] * 3 == fractions
    if name != "error":
        assert fractions == pytest.approx([0.5] * 6)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("costs", "levels"),
    [([17280, 10368, 55296, 27648], 32), ([960, 576, 3072, 576], 576), ([5, 7, 11], 16), ([1, 1, 1], 100000)],
)
def test_the_budget_holds_to_the_weight(costs: list[int], levels: int, keep: float) -> None:
    generator = torch.Generator().manual_seed(0)
    every = costs * 6
    base = max(1, math.floor(levels * keep))
    total = sum(every) * base
    for spread in (0.0, 0.05, 0.4):
        ideal = [base + spread * levels * float(value) for value in torch.randn(len(every), generator=generator)]
        found = fit_levels(ideal, every, [levels - 1] * len(every), total)
        assert sum(level * cost for level, cost in zip(found, every, strict=True)) == total
        assert all(1 <= level < levels for level in found)
        if not spread:
            assert found == [base] * len(every)


def test_levels_follow_the_ideal() -> None:
    found = fit_levels([10.0, 20.0, 16.0, 18.4, 15.6], [3, 3, 3, 2, 2], [31] * 5, 10 * 3 + 20 * 3 + 16 * 3 + 34 * 2)
    assert found == [10, 20, 16, 18, 16]


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="no allocation keeps exactly 7 weights"):
        fit_levels([1.0, 1.0], [4, 6], [3, 3], 7)
    with pytest.raises(ConfigError, match="spread"):
        Owl(spread=0.6)
