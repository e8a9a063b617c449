"""Reconstruction under a frozen mask, against least squares row by row and a slow sweep."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crepe_deploy.errors import CalibrationError, ConfigError, NumericalError
from crepe_deploy.model.stats import Stats
from crepe_deploy.pattern import NM, Pattern, Unstructured
from crepe_deploy.pruning.steps.reconstruct import RECONSTRUCTORS, Exact, Obs, make_goal, solve_masked
from crepe_deploy.select import select

PATTERNS: list[Pattern] = [NM(2, 4), NM(1, 4), NM(16, 32), Unstructured(0.5), Unstructured(0.7, "matrix")]


def layer(rows: int = 6, columns: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Stats]:
    """Weight (rows, columns), correlated inputs (tokens, columns) and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs, Stats(hessian=2 / 8 * inputs.T @ inputs)


def output_errors(change: Tensor, inputs: Tensor) -> Tensor:
    return (inputs.double() @ change.double().T).square().sum(0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_exact_is_least_squares_row_by_row(pattern: Pattern) -> None:
    weight, inputs, stats = layer()
    mask = select(weight.abs(), pattern)
    found = Exact(damping=1e-6, tolerance=1e-6, max_steps=2000)(weight, weight, mask, stats, NM(2, 4)).weight
    for row in range(len(weight)):
        kept = mask[row]
        wanted = inputs.double() @ weight[row].double()
        expected = torch.linalg.lstsq(inputs[:, kept].double(), wanted.unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(found[row, kept].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damping", [0.01, 0.3])
def test_exact_with_damping_solves_the_damped_normal_equations(damping: float) -> None:
    weight, _, stats = layer()
    assert stats.hessian is not None
    mask = select(weight.abs(), NM(2, 4))
    found = Exact(damping=damping, tolerance=1e-6, max_steps=2000)(weight, weight, mask, stats, NM(2, 4)).weight
    gram = stats.hessian.double() + damping * stats.hessian.diagonal().double().mean() * torch.eye(64)
    for row in range(len(weight)):
        kept = mask[row]
        right = gram[kept] @ weight[row].double()
        torch.testing.assert_close(
            found[row, kept].double(), torch.linalg.solve(gram[kept][:, kept], right), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("name", RECONSTRUCTORS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_row_gets_worse_and_zeros_stay(name: str, pattern: Pattern) -> None:
    weight, inputs, stats = layer(rows=40)
    mask = select(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)), pattern)
    solution = RECONSTRUCTORS[name]()(weight, weight, mask, stats, pattern)
    width = pattern.m if isinstance(pattern, NM) else mask.numel() if pattern.granularity == "matrix" else 64
    assert torch.equal(solution.mask.view(-1, width).sum(1), mask.view(-1, width).sum(1))
    assert torch.equal(solution.mask, mask) == (name != "admm")
    assert not solution.weight[~solution.mask].any()
    goal = make_goal(weight, stats, solution.notes["damping"])
    assert (goal.error(solution.weight) <= goal.error(weight * mask)).all()
    before, after = (output_errors(weight - new, inputs).sum() for new in (weight * mask, solution.weight))
    assert after < before
    assert 0 < solution.notes["error_left"] < 1


@pytest.mark.parametrize("name", ["exact", "admm"])
def test_layers_that_share_an_input_share_its_factorisations_and_nothing_else(name: str) -> None:
    first, inputs, stats = layer(rows=8)
    second, dense_inputs = torch.flip(first, (0,)), inputs + 0.1 * torch.flip(inputs, (0,))
    together = replace(stats, cross=2 / 8 * dense_inputs.T @ inputs)
    mask = select(first.abs(), NM(2, 4))
    for weight in (first, second):
        alone = replace(together)
        expected = RECONSTRUCTORS[name]()(weight, weight, mask, alone, NM(2, 4))
        shared = RECONSTRUCTORS[name]()(weight, weight, mask, together, NM(2, 4))
        assert torch.equal(shared.weight, expected.weight)
        assert shared.notes == expected.notes
        assert len(together.memo) == len(alone.memo) == (1 if name == "exact" else 2)


def test_exact_is_at_least_as_good_as_the_sweep_and_every_step_helps() -> None:
    weight, _, stats = layer(rows=40)
    mask = select(weight.abs(), NM(2, 4))
    goal = make_goal(weight, stats, 0.01)
    errors = [goal.error(solve_masked(goal, weight, mask, 1e-6, steps)[0]).sum() for steps in range(8)]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert (
        goal.error(Exact()(weight, weight, mask, stats, NM(2, 4)).weight).sum()
        < goal.error(Obs()(weight, weight, mask, stats, NM(2, 4)).weight).sum()
    )


def test_the_sweep_is_the_slow_loop() -> None:
    weight, _, stats = layer(rows=4, columns=24)
    mask = select(weight.abs(), NM(2, 4))
    hessian = stats.hessian
    assert hessian is not None
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(24)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    expected = weight.double().clone()
    for column in range(24):
        error = expected[:, column] * ~mask[:, column] / upper[column, column]
        for later in range(column, 24):
            expected[:, later] -= error * upper[column, later]
    for block_size in (4, 128):
        found = Obs(block_size=block_size)(weight, weight, mask, stats, NM(2, 4))
        assert found.notes["rows_left_alone"] == 0
        torch.testing.assert_close(found.weight.double(), expected * mask, rtol=1e-3, atol=1e-4)


def test_a_start_that_is_already_best_stays() -> None:
    weight, _, stats = layer()
    solution = Exact()(weight, weight, torch.ones_like(weight, dtype=torch.bool), stats, NM(2, 4))
    assert torch.equal(solution.weight, weight)


def test_dead_inputs_keep_their_weights_and_change_nothing() -> None:
    weight, inputs, _ = layer()
    inputs[:, 5] = 0
    stats = Stats(hessian=inputs.T @ inputs)
    mask = select(weight.abs(), NM(2, 4))
    mask[:, 4:8] = torch.tensor([True, True, False, False])
    found = Exact()(weight, weight, mask, stats, NM(2, 4)).weight
    assert torch.equal(found[:, 5], weight[:, 5])
    assert found.isfinite().all()


def test_what_cannot_work_is_refused() -> None:
    weight, _, _ = layer()
    mask = select(weight.abs(), NM(2, 4))
    with pytest.raises(CalibrationError, match="hessian"):
        Exact()(weight, weight, mask, Stats(), NM(2, 4))
    broken = Stats(hessian=torch.full((64, 64), float("nan")))
    for reconstruct in (Exact(), Obs()):
        with pytest.raises(NumericalError, match="not finite"):
            reconstruct(weight, weight, mask, broken, NM(2, 4))
    with pytest.raises(ConfigError, match="damping"):
        Exact(damping=0)
    with pytest.raises(ConfigError, match="max_steps"):
        Exact(max_steps=0)
