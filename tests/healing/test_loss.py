"""The loss against plain autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crepe_deploy.healing.loss import divergence
from crepe_deploy.quality.scoring import kl_per_token


def logits(seed: int, rows: int = 37, tokens: int = 50) -> Tensor:
    return 3 * torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_divergence_that_eval_reports() -> None:
    dense, model = logits(0).float(), logits(1).float()
    assert torch.allclose(divergence(dense, model), kl_per_token(dense, model), atol=1e-6)
    assert divergence(dense, dense).abs().max() < 1e-5


def slow(dense: Tensor, model: Tensor, top_k: int | None) -> Tensor:
    """Row by row, token by token."""
    values = []
    for aim, ours in zip(dense.softmax(-1), model.softmax(-1), strict=True):
        if top_k is not None:
            order = aim.argsort(descending=True)
            aim, ours = (torch.cat([part[order[:top_k]], part[order[top_k:]].sum()[None]]) for part in (aim, ours))
        values.append(sum(p * (p.log() - q.log()) for p, q in zip(aim, ours, strict=True)))
    return torch.stack(values)


@pytest.mark.parametrize("top_k", [None, 1, 7, 49])
def test_value_and_gradient_are_those_of_the_definition(top_k: int | None) -> None:
    dense, weights = logits(0), torch.rand(37, generator=torch.Generator().manual_seed(2))
    ours, theirs = logits(1).requires_grad_(), logits(1).requires_grad_()
    value, expected = divergence(dense, ours, top_k), slow(dense, theirs, top_k)
    assert torch.allclose(value.double(), expected, atol=1e-5)
    (value * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_all_tokens_as_the_likeliest_are_the_whole() -> None:
    dense, model = logits(0).float(), logits(1).float()
    assert torch.allclose(divergence(dense, model, 50), divergence(dense, model), atol=1e-5)
    assert torch.allclose(divergence(dense, model, 500), divergence(dense, model), atol=1e-5)


def test_coarse_logits_get_a_gradient_of_their_own_dtype() -> None:
    model = logits(1).bfloat16().requires_grad_()
    divergence(logits(0).bfloat16(), model, 5).sum().backward()
    assert model.grad is not None and model.grad.dtype == torch.bfloat16 and model.grad.isfinite().all()
