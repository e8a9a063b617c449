"""Channel permutation: the search never loses score, and its parts are what brute force finds."""

from __future__ import annotations

import itertools

import pytest
import torch

from crepe_deploy.pruning.steps.permute import Fold, assign_columns, retained_score, spread_columns, worth


def scores(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) * torch.rand(columns, generator=generator) ** 4


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (16, 32)])
@pytest.mark.parametrize("seed", range(3))
def test_the_search_never_loses_score_and_usually_gains(n: int, m: int, seed: int) -> None:
    score = scores(20, 64, seed)
    order = Fold().search(score, n, m)
    assert torch.equal(order.sort().values, torch.arange(64))
    before, after = retained_score(score, n, m), retained_score(score[:, order], n, m)
    assert after > before
    more = Fold(rounds=4).search(score, n, m)
    assert retained_score(score[:, more], n, m) >= after


def test_an_order_that_cannot_be_bettered_is_kept() -> None:
    score = scores(5, 8)
    assert torch.equal(Fold().search(score, 4, 8), torch.arange(8))
    assert torch.equal(Fold().search(torch.ones(5, 16), 2, 4), torch.arange(16))


@pytest.mark.parametrize("start", [torch.arange(16), torch.arange(16).flip(0)])
def test_no_round_of_assignment_loses_score(start: torch.Tensor) -> None:
    for seed in range(5):
        score = scores(6, 16, seed)
        found = assign_columns(score, start, 2, 4)
        assert torch.equal(found.sort().values, torch.arange(16))
        assert retained_score(score[:, found], 2, 4) >= retained_score(score[:, start], 2, 4) - 1e-6


def test_worth_is_what_a_group_gains() -> None:
    score = scores(5, 12)
    others = torch.tensor([[0, 4, 2], [1, 5, 9]])
    columns = torch.tensor([3, 7, 11])
    gain = worth(score, others, columns, 2)
    for group, column in itertools.product(range(2), range(3)):
        members = [*others[group].tolist(), int(columns[column])]
        kept = retained_score(score[:, members], 2, 4)
        stayed = float(score[:, others[group]].topk(2, dim=1).values.sum())
        assert float(gain[group, column]) == pytest.approx(kept - stayed, abs=1e-5)


def test_a_slot_is_assigned_as_well_as_brute_force_does() -> None:
    score = scores(4, 12)
    groups = torch.arange(12).view(3, 4)
    best = max(
        retained_score(
            torch.cat([score[:, [column, *rest[1:]]] for column, rest in zip(taken, groups.tolist(), strict=True)], 1),
            2,
            4,
        )
        for taken in itertools.permutations(groups[:, 0].tolist())
    )
    gain = worth(score, groups[:, 1:], groups[:, 0], 2)
    stayed = sum(float(score[:, group[1:]].topk(2, dim=1).values.sum()) for group in groups)
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    assert stayed + float(gain[rows, columns].sum()) == pytest.approx(best, rel=1e-5)


def test_columns_are_dealt_as_the_first_stage_says() -> None:
    score = torch.tensor([[5.0, 1.0, 7.0, 3.0, 8.0, 2.0, 6.0, 4.0]])
    # ascending columns: 1 5 | 3 7 | 0 6 | 2 4; odd slots backwards
    assert spread_columns(score, 4).tolist() == [1, 7, 0, 4, 5, 3, 6, 2]
