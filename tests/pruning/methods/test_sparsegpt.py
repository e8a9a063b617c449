"""SparseGPT against an fp64 loop, exact counts, and what happens when the hessian cannot be factorised."""

import math

import pytest
import torch
from torch import Tensor

from crepe_deploy.errors import CalibrationError, NumericalError, PatternError
from crepe_deploy.model.stats import Stats
from crepe_deploy.pattern import NM, Granularity, Pattern, Unstructured
from crepe_deploy.pruning.methods.magnitude import Magnitude
from crepe_deploy.pruning.methods.sparsegpt import SparseGPT, factorise
from crepe_deploy.select import select
from tests.pruning.methods import reference


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Stats]:
    """Weight (rows, columns), correlated inputs (tokens, columns) and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(6 * columns + 20, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs, Stats(hessian=2 / 8 * inputs.T @ inputs)


def hessian(stats: Stats) -> Tensor:
    assert stats.hessian is not None
    return stats.hessian


@pytest.mark.parametrize(
    ("rows", "columns", "n", "m", "block"),
    [(3, 8, 2, 4, 128), (1, 4, 1, 4, 128), (4, 48, 2, 4, 16), (3, 45, 1, 3, 16), (2, 40, 3, 5, 1), (2, 64, 16, 32, 20)],
)
def test_nm_matches_the_loop(rows: int, columns: int, n: int, m: int, block: int) -> None:
    weight, _, stats = layer(rows, columns)
    solution = SparseGPT(block_size=block).solve(weight, stats, NM(n, m))
    expected, mask = reference.sparsegpt(weight, hessian(stats), damping=0.01, block=block, nm=(n, m))
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("granularity", ["row", "matrix"])
@pytest.mark.parametrize(("rows", "columns", "block"), [(3, 8, 128), (1, 5, 2), (4, 50, 16), (5, 33, 32)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_unstructured_matches_the_loop(
    rows: int, columns: int, block: int, sparsity: float, granularity: Granularity
) -> None:
    weight, _, stats = layer(rows, columns)
    rowwise = granularity == "row"
    zeros = int(round((columns if rowwise else rows * columns) * sparsity, 6))
    solution = SparseGPT(block_size=block).solve(weight, stats, Unstructured(sparsity, granularity))
    expected, mask = reference.sparsegpt(
        weight, hessian(stats), damping=0.01, block=block, nm=None, zeros=zeros, rowwise=rowwise
    )
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight.double(), expected, rtol=1e-3, atol=1e-4)
    counts = (~solution.mask).sum(dim=1) if rowwise else (~solution.mask).sum()
    assert (counts == zeros).all()


PATTERNS: list[Pattern] = [NM(2, 4), NM(1, 3), NM(8, 16), Unstructured(0.5, "row"), Unstructured(0.7, "matrix")]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_below_magnitude(pattern: Pattern, dtype: torch.dtype) -> None:
    weight, inputs, stats = layer(64, 336)
    weight = weight.to(dtype)
    solution = SparseGPT().solve(weight, stats, pattern)
    magnitude = weight.float() * select(Magnitude().score(weight, stats), pattern)

    def error(pruned: Tensor) -> float:
        return float((inputs @ (pruned - weight.float()).T).norm())

    assert error(solution.weight) < 0.95 * error(magnitude)
    assert solution.weight.dtype == torch.float32
    assert (solution.weight[~solution.mask] == 0).all()
    assert solution.notes == {"damping": 0.01}


def test_inputs_stay() -> None:
    weight, _, stats = layer(4, 16)
    weight_before, hessian_before = weight.clone(), hessian(stats).clone()
    SparseGPT().solve(weight, stats, NM(2, 4))
    assert torch.equal(weight, weight_before)
    assert torch.equal(hessian(stats), hessian_before)


def test_transposed_weight() -> None:
    weight, _, stats = layer(6, 16)
    stored = weight.t().contiguous()
    before = stored.clone()
    assert torch.equal(
        SparseGPT().solve(stored.t(), stats, NM(2, 4)).weight, SparseGPT().solve(weight, stats, NM(2, 4)).weight
    )
    assert torch.equal(stored, before)


def test_dead_columns() -> None:
    weight, inputs, _ = layer(5, 24)
    inputs[:, [3, 4, 5, 6, 20]] = 0
    stats = Stats(hessian=inputs.T @ inputs)
    solution = SparseGPT(block_size=8).solve(weight, stats, NM(2, 4))
    expected, mask = reference.sparsegpt(weight, hessian(stats), damping=0.01, block=8, nm=(2, 4))
    assert torch.equal(solution.mask, mask)
    assert (solution.weight[:, [3, 4, 5, 6, 20]] == 0).all()
    torch.testing.assert_close(solution.weight.double(), expected, rtol=1e-3, atol=1e-4)


def test_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    _, _, stats = layer(1, 40)
    factor = factorise(hessian(stats), 0.01, 1.0)
    damped = hessian(stats).double() + 0.01 * hessian(stats).double().diagonal().mean() * torch.eye(40)
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(
        factor.upper.double(), torch.linalg.cholesky(torch.linalg.inv(damped), upper=True), rtol=1e-4, atol=1e-6
    )


def test_factor_is_shared_through_the_statistics() -> None:
    weight, _, stats = layer(4, 16)
    method = SparseGPT()
    method.solve(weight, stats, NM(2, 4))
    (factor,) = stats.memo.values()
    method.solve(-weight, stats, NM(2, 4))
    assert list(stats.memo.values()) == [factor]
    SparseGPT(damping=0.1).solve(weight, stats, NM(2, 4))
    assert len(stats.memo) == 2


@pytest.mark.parametrize(("lowest", "expected"), [(-0.05, 0.1), (-0.5, 1.0)])
def test_damping_is_raised_and_recorded(lowest: float, expected: float) -> None:
    """A hessian with one negative eigenvalue is positive definite only once damping outweighs it."""
    diagonal = torch.ones(16)
    diagonal[3] = lowest
    weight = torch.randn(4, 16)
    solution = SparseGPT().solve(weight, Stats(hessian=torch.diag(diagonal)), NM(2, 4))
    assert solution.notes["damping"] == pytest.approx(expected)


def test_indefinite_hessian_fails() -> None:
    diagonal = torch.ones(16)
    diagonal[3] = -5
    with pytest.raises(NumericalError, match=r"not positive definite, even with 1 of .* max_damping above 1"):
        SparseGPT().solve(torch.randn(4, 16), Stats(hessian=torch.diag(diagonal)), NM(2, 4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_inputs_fail(value: float) -> None:
    weight, _, stats = layer(4, 16)
    weight[1, 2] = value
    with pytest.raises(NumericalError):
        SparseGPT().solve(weight, stats, NM(2, 4))
    hessian(stats)[1, 1] = value
    with pytest.raises(NumericalError, match="hessian is not finite"):
        SparseGPT().solve(torch.randn(4, 16), Stats(hessian=stats.hessian), NM(2, 4))


def test_arguments_are_checked() -> None:
    with pytest.raises(CalibrationError, match="hessian"):
        SparseGPT().solve(torch.randn(4, 16), Stats(), NM(2, 4))
    with pytest.raises(CalibrationError, match="the weight needs"):
        SparseGPT().solve(torch.randn(4, 16), Stats(hessian=torch.eye(8)), NM(2, 4))
    with pytest.raises(PatternError, match="18 input columns"):
        SparseGPT().solve(torch.randn(4, 18), Stats(hessian=torch.eye(18)), NM(2, 4))
