"""Local pruning against brute force: least squares on explicit inputs, exhaustive removal, fp64 throughout."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from crepe_deploy.errors import CalibrationError, ConfigError, NumericalError
from crepe_deploy.model.stats import Stats
from crepe_deploy.structural.levels import LocalRules, attention_levels, flap, neuron_levels
from crepe_deploy.structural.local import VARIANTS, Quadratic, quadratic, refit_nested, removal_order
from crepe_deploy.structural.plan import Geometry

TOKENS = 60


def inputs(channels: int, seed: int = 0) -> Tensor:
    """Correlated activations (tokens, channels) fp64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    scale = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.1
    return torch.randn(TOKENS, channels, generator=generator, dtype=torch.float64) @ mixing * scale


def layer(channels: int = 12, out: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Stats]:
    """X (tokens, in), W (out, in), and the statistics of X, all fp64."""
    x = inputs(channels, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(out, channels, generator=generator, dtype=torch.float64)
    return x, weight, Stats(hessian=x.T @ x)


def least_squares(x: Tensor, wanted: Tensor, weight: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """argmin over W' (out, kept) of ||X_kept W'^T - Y||^2 + ridge * ||W'_kept - W_kept||^2.

    The ridge is stacked under X and `lstsq` solves it, which never forms X^T X.
    """
    stacked = torch.cat([x, ridge**0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    target = torch.cat([wanted, ridge**0.5 * weight.T])
    return torch.linalg.lstsq(stacked[:, kept], target).solution.T


def objective(problem: Quadratic, kept: Tensor) -> float:
    """The least value of f over weights that are zero outside `kept`."""
    gradient = problem.gradient[kept]
    solved = torch.linalg.solve(problem.hessian[kept][:, kept], gradient)
    return float(-(solved * gradient).sum() / 2)


@pytest.mark.parametrize("size", [1, 5, 11])
def test_the_refit_is_the_least_squares_solution(size: int) -> None:
    x, weight, stats = layer()
    level = neuron_levels(weight, stats, [size], LocalRules())[size]
    ridge = 0.01 * float((x.T @ x).diagonal().mean())
    expected = least_squares(x, x @ weight.T, weight, level.columns, ridge)
    torch.testing.assert_close(level.weight, expected, rtol=1e-8, atol=1e-8)


def test_the_refit_aims_at_the_dense_models_output() -> None:
    x, weight, _ = layer()
    dense, lost = inputs(12, seed=5), torch.randn(TOKENS, 7, dtype=torch.float64)
    stats = Stats(hessian=x.T @ x, cross=dense.T @ x, drift=lost.T @ x)
    level = neuron_levels(weight, stats, [6], LocalRules())[6]
    ridge = 0.01 * float((x.T @ x).diagonal().mean())
    expected = least_squares(x, dense @ weight.T + lost, weight, level.columns, ridge)
    torch.testing.assert_close(level.weight, expected, rtol=1e-8, atol=1e-8)


def test_one_factorisation_serves_every_size() -> None:
    _, weight, stats = layer(channels=20)
    problem = quadratic(weight, stats)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    for size, found in zip([20, 9, 4, 1], refit_nested(problem, order, [20, 9, 4, 1]), strict=True):
        kept = order[:size]
        expected = torch.linalg.solve(problem.hessian[kept][:, kept], problem.gradient[kept])
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_obs_removes_what_costs_least_at_every_step() -> None:
    _, weight, stats = layer(channels=9)
    problem = quadratic(weight, stats)
    order = removal_order(problem, torch.arange(9).unsqueeze(1), "obs", dtype=torch.float64)
    kept = list(range(9))
    for chosen in order:
        costs = {c: objective(problem, torch.tensor([k for k in kept if k != c])) for c in kept}
        assert chosen == min(costs, key=lambda channel: costs[channel])
        kept.remove(chosen)


def test_obs_heads_are_removed_by_what_whole_heads_cost() -> None:
    _, weight, stats = layer(channels=12)
    problem = quadratic(weight, stats)
    units = torch.arange(12).view(4, 3)
    order = removal_order(problem, units, "obs", dtype=torch.float64)
    kept = [0, 1, 2, 3]
    for chosen in order:
        costs = {u: objective(problem, units[[k for k in kept if k != u]].flatten()) for u in kept}
        assert chosen == min(costs, key=lambda unit: costs[unit])
        kept.remove(chosen)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_the_first_removal_has_the_lowest_printed_score(variant: str) -> None:
    _, weight, stats = layer(channels=10)
    problem = quadratic(weight, stats)
    inverse = torch.linalg.inv(problem.hessian)
    scores = []
    for p in range(10):
        gradient = float(problem.gradient[p] @ weight[:, p])
        first = abs(gradient) if variant == "paper" else gradient
        scores.append(first + float(weight[:, p] @ weight[:, p]) / (2 * float(inverse[p, p])))
    order = removal_order(problem, torch.arange(10).unsqueeze(1), variant, dtype=torch.float64)
    assert order[0] == min(range(10), key=lambda p: scores[p])


def test_head_scores_are_the_papers_mean_and_the_codes_block_sum() -> None:
    _, weight, stats = layer(channels=6)
    problem = quadratic(weight, stats)
    inverse, rows = torch.linalg.inv(problem.hessian), weight.T
    units, gradient = rows.reshape(2, 3, -1), problem.gradient.reshape(2, 3, -1)
    paper, code = (VARIANTS[name](units, gradient, inverse) for name in ("paper", "code"))
    for head in range(2):
        g = slice(3 * head, 3 * head + 3)
        channels = [
            abs(float(problem.gradient[p] @ rows[p])) + float(rows[p] @ rows[p]) / (2 * float(inverse[p, p]))
            for p in range(3 * head, 3 * head + 3)
        ]
        assert float(paper[head]) == pytest.approx(sum(channels) / 3)
        inner = torch.linalg.inv(inverse[g, g]) @ rows[g] / 2 + problem.gradient[g]
        assert float(code[head]) == pytest.approx(float((rows[g] * inner).sum()))


def test_the_downdated_sweep_in_rounds_keeps_the_best_weights() -> None:
    """A sweep in rounds of 4 must choose what recomputing the inverse from scratch before each round chooses."""
    _, weight, stats = layer(channels=16)
    problem = quadratic(weight, stats)
    order = removal_order(problem, torch.arange(16).unsqueeze(1), "code", per_round=4, dtype=torch.float64)
    kept, expected = list(range(16)), []
    while len(kept) > 1:
        index = torch.tensor(kept)
        inverse = torch.linalg.inv(problem.hessian[index][:, index])
        rows = inverse @ problem.gradient[index]
        score = (rows * problem.gradient[index]).sum(1) + rows.square().sum(1) / (2 * inverse.diagonal())
        gone = [kept[place] for place in score.argsort()[: min(4, len(kept) - 1)].tolist()]
        expected += gone
        kept = [channel for channel in kept if channel not in gone]
    assert order == expected


def test_float32_sweeps_choose_like_float64_where_scores_differ() -> None:
    _, weight, stats = layer(channels=32, out=16)
    problem, units = quadratic(weight, stats), torch.arange(32).unsqueeze(1)
    assert removal_order(problem, units, "obs", dtype=torch.float32) == removal_order(
        problem, units, "obs", dtype=torch.float64
    )


def test_levels_are_nested_and_nothing_removed_changes_nothing() -> None:
    _, weight, stats = layer(channels=24)
    weight = weight.to(torch.bfloat16)
    found = neuron_levels(weight, stats, [24, 16, 8, 3], LocalRules(per_round=5))
    assert torch.equal(found[24].weight, weight)
    for larger, smaller in itertools.pairwise([24, 16, 8, 3]):
        assert set(found[smaller].columns.tolist()) < set(found[larger].columns.tolist())
        assert found[smaller].columns.tolist() == sorted(found[smaller].columns.tolist())
        assert found[smaller].weight.dtype == torch.bfloat16 and found[smaller].weight.shape == (7, smaller)


GEOMETRY = Geometry(hidden=7, heads=6, kv_heads=3, head_dim=4, intermediate=8, layers=1)


@pytest.mark.parametrize("select", ["saliency", "magnitude", "random"])
def test_attention_levels_keep_equal_queries_in_whole_groups(select: str) -> None:
    _, weight, stats = layer(channels=24)
    sizes = [(groups, queries) for groups in (1, 2, 3) for queries in (1, 2)]
    rules = LocalRules(select=select)
    found = attention_levels(weight, stats, sizes, GEOMETRY, rules)
    assert set(found) == set(sizes)
    problem = quadratic(weight, stats)
    for (groups, queries), level in found.items():
        assert len(level.groups) == groups and {len(kept) for kept in level.queries} == {queries}
        channels = [
            (group * 2 + query) * 4 + feature
            for group, kept in zip(level.groups, level.queries, strict=True)
            for query in kept
            for feature in range(4)
        ]
        assert level.columns.tolist() == channels
        expected = torch.linalg.solve(problem.hessian[channels][:, channels], problem.gradient[channels]).T
        torch.testing.assert_close(level.weight, expected, rtol=1e-7, atol=1e-7)
    assert set(found[1, 2].groups) < set(found[2, 2].groups)


def test_query_heads_go_one_by_one_from_every_group_by_their_cost() -> None:
    _, weight, stats = layer(channels=24)
    geometry = Geometry(hidden=7, heads=6, kv_heads=2, head_dim=4, intermediate=8, layers=1)
    problem = quadratic(weight, stats)
    level = attention_levels(weight, stats, [(2, 2)], geometry, LocalRules(variant="obs"))[2, 2]
    for group in (0, 1):
        costs = {}
        for query in range(3):
            head = group * 3 + query
            costs[query] = objective(problem, torch.tensor([c for c in range(24) if c // 4 != head]))
        assert min(costs, key=lambda query: costs[query]) not in level.queries[group]


def test_without_refit_kept_weights_stay_and_scores_decide() -> None:
    x, weight, _ = layer(channels=10)
    stats = Stats(variance=x.var(0, correction=0))
    level = neuron_levels(weight, stats, [4], LocalRules(select="flap", refit=False))[4]
    worth = flap(weight, stats)
    assert set(level.columns.tolist()) == set(worth.topk(4).indices.tolist())
    assert torch.equal(level.weight, weight[:, level.columns])


def test_random_selection_depends_on_seed_and_salt_alone() -> None:
    _, weight, stats = layer(channels=30)

    def kept(seed: int, salt: int) -> list[int]:
        rules = LocalRules(select="random", refit=False, seed=seed)
        return list(neuron_levels(weight, stats, [10], rules, salt)[10].columns.tolist())

    assert kept(0, 0) == kept(0, 0)
    assert kept(0, 0) != kept(1, 0) and kept(0, 0) != kept(0, 1)


def test_degenerate_inputs_are_pulled_to_the_weight_or_refused() -> None:
    _, weight, _ = layer(channels=6)
    level = neuron_levels(weight, Stats(hessian=torch.zeros(6, 6)), [3], LocalRules())[3]
    torch.testing.assert_close(level.weight, weight[:, level.columns])
    with pytest.raises(NumericalError, match="not finite"):
        quadratic(weight, Stats(hessian=torch.full((6, 6), float("nan"))))
    with pytest.raises(NumericalError, match="not positive definite"):
        removal_order(Quadratic(-torch.eye(6).double(), weight.T), torch.arange(6).unsqueeze(1))
    with pytest.raises(CalibrationError, match="Hessian"):
        quadratic(weight, Stats())


def test_unknown_names_are_refused_with_the_known() -> None:
    with pytest.raises(ConfigError, match="paper, code, obs"):
        LocalRules(variant="best")
    with pytest.raises(ConfigError, match="magnitude"):
        LocalRules(select="taylor")
