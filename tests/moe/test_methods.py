"""Which experts go: exact choices on statistics that leave no doubt, and counts over groups."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from crepe_deploy.moe.measure import LayerStats
from crepe_deploy.moe.methods import METHODS


def stats(tokens: list[float], reap: list[float], gram: torch.Tensor) -> LayerStats:
    return LayerStats(torch.tensor(tokens), torch.tensor(tokens), torch.tensor(reap), gram.float())


EXAMPLE = stats([9, 1, 4, 2], [9, 5, 2, 6], torch.diag(torch.tensor([3.0, 4.0, 1.0, 2.0])))


@pytest.mark.parametrize(("method", "gone"), [("frequency", [1, 3]), ("reap", [0, 2]), ("output-error", [2, 3])])
def test_the_least_go(method: str, gone: list[int]) -> None:
    assert METHODS[method].removed(EXAMPLE, 2, 1, 0) == gone


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("count", "groups"), [(1, 1), (5, 1), (2, 2), (6, 2), (4, 4), (8, 4)])
def test_groups_lose_equally_many_and_the_same_again(method: str, count: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(count)
    factor = torch.randn(12, 12, generator=generator)
    some = stats(torch.randint(1, 99, (12,), generator=generator).tolist(), [*range(12)], factor @ factor.T)
    gone = METHODS[method].removed(some, count, groups, 3)
    assert gone == sorted(set(gone)) == METHODS[method].removed(some, count, groups, 3)
    per_group = [sum(one // (12 // groups) == group for one in gone) for group in range(groups)]
    assert per_group == [count // groups] * groups


def test_an_expert_that_saw_no_token_goes_first() -> None:
    some = stats([9, 0, 4, 2], [9, 0, 2, 6], torch.diag(torch.tensor([3.0, 0.0, 1.0, 2.0])))
    for method in ("reap", "frequency", "output-error"):
        assert METHODS[method].removed(some, 1, 1, 0) == [1]


def test_errors_that_cancel_are_taken_together() -> None:
    """Second order: two experts whose losses are opposite cost nothing together; the two least alone do."""
    loss = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.0, 1.05], [0.0, 1.1]])
    gram = loss @ loss.T
    pairs = {pair: float(loss[list(pair)].sum(0).square().sum()) for pair in combinations(range(4), 2)}
    assert METHODS["output-error"].removed(stats([1] * 4, [1] * 4, gram), 2, 1, 0) == list(
        min(pairs, key=pairs.__getitem__)
    )
