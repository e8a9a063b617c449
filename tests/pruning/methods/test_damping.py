"""The rules of damping: what each adds, that every solver goes by them, and where they differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError, NumericalError
from crepe_deploy.model.stats import Stats
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.methods.damping import RULES, DampingRule, revive, ridge
from crepe_deploy.pruning.methods.sparsegpt import SparseGPT
from crepe_deploy.pruning.steps.reconstruct import RECONSTRUCTORS, Exact, make_goal
from crepe_deploy.select import select


def outliers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (rows, columns), and inputs (tokens, columns) with outlier channels: to fit to, and held out."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, 64, generator=draw) / 8
    sizes = torch.ones(64)
    sizes[:4] = torch.tensor([30.0, 30.0, 100.0, 100.0])
    inputs = torch.randn(2 * 512, 64, generator=draw) @ mixing * sizes
    return torch.randn(16, 64, generator=draw), inputs[:512], inputs[512:]


def added(rule: DampingRule, diagonal: Tensor) -> Tensor:
    mean = float(diagonal.double().mean())
    each = [mean if rule == "mean" else (float(one) * mean) ** 0.5 for one in diagonal.double()]
    return torch.tensor(each, dtype=torch.float64)


@pytest.mark.parametrize("rule", RULES)
def test_every_solver_adds_what_the_rule_says(rule: DampingRule) -> None:
    weight, inputs, _ = outliers()
    gram = 2 / 8 * inputs.T @ inputs
    expected = gram.double() + 0.1 * added(rule, gram.diagonal()).diag()
    torch.testing.assert_close(make_goal(weight, Stats(hessian=gram), 0.1, rule).gram, expected.float())
    factor = SparseGPT(0.1, damping_rule=rule).factor(Stats(hessian=gram), weight)
    upper = factor.upper.double()
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(expected), rtol=1e-2, atol=1e-6)
    stats, mask = Stats(hessian=gram), select(weight.abs(), NM(2, 4))
    exact = Exact(0.1, 1e-6, 2000, rule)(weight, weight, mask, stats, NM(2, 4)).weight
    for row, kept in enumerate(mask):
        right = expected[kept] @ weight[row].double()
        solved = torch.linalg.solve(expected[kept][:, kept], right)
        torch.testing.assert_close(exact[row, kept].double(), solved, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", RECONSTRUCTORS)
def test_the_rules_keep_what_they_factorise_apart(name: str) -> None:
    weight, inputs, _ = outliers()
    together = Stats(hessian=2 / 8 * inputs.T @ inputs, cross=2 / 8 * inputs.T @ inputs)
    mask = select(weight.abs(), NM(2, 4))
    for rule in RULES:
        step = RECONSTRUCTORS[name](damping_rule=rule)
        shared = step(weight, weight, mask, together, NM(2, 4)).weight
        assert torch.equal(shared, step(weight, weight, mask, replace(together), NM(2, 4)).weight)


def test_beside_outliers_the_geometric_rule_fits_the_other_channels_too() -> None:
    weight, inputs, held = outliers()
    errors = {}
    for rule in RULES:
        stats = Stats(hessian=2 / 8 * inputs.T @ inputs)
        mask = select(weight.abs() * inputs.norm(dim=0), NM(2, 4))
        fitted = RECONSTRUCTORS["admm"](damping_rule=rule)(weight, weight, mask, stats, NM(2, 4)).weight
        errors[rule] = float(((weight - fitted) @ held.T).square().sum())
    assert errors["geometric"] < 0.9 * errors["mean"]


def test_dead_inputs_are_revived_and_what_is_not_finite_is_refused() -> None:
    gram = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    assert revive(gram).tolist() == [False, True] and gram.diagonal().tolist() == [4, 1]
    torch.testing.assert_close(ridge(gram.diagonal(), "geometric"), torch.tensor([10.0, 2.5]).sqrt())
    with pytest.raises(NumericalError, match="the hessian is not finite"):
        revive(torch.tensor([[float("nan")]]))


@pytest.mark.parametrize(
    "config",
    [{"reconstruct": f"{name}:damping_rule=geometri"} for name in RECONSTRUCTORS]
    + [{"method": "sparsegpt", "params": {"damping_rule": "geometri"}}],
    ids=str,
)
def test_an_unknown_rule_is_refused_with_what_was_meant(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"damping_rule.*geometric"):
        prune_config(**{"method": "ria", **config})
