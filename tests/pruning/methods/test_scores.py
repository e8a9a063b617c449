"""Magnitude, Wanda, RIA and CRePE against loops, and what CRePE promises about RIA."""

import hashlib
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crepe_deploy.errors import CalibrationError
from crepe_deploy.model.stats import Stats
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.methods import METHODS, get_method
from crepe_deploy.pruning.methods.base import ScoreMethod
from crepe_deploy.pruning.methods.crepe import Crepe
from crepe_deploy.pruning.methods.magnitude import Magnitude
from crepe_deploy.pruning.methods.neighbourhoods import CHUNK, Neighbourhood, Window, box_sums, with_neighbourhood
from crepe_deploy.pruning.methods.ria import RIA, relative_importance
from crepe_deploy.pruning.methods.wanda import Wanda
from crepe_deploy.select import select
from tests.pruning.methods import reference

FORMS: tuple[Neighbourhood, ...] = get_args(Neighbourhood)
WINDOWS: tuple[Window, ...] = get_args(Window)
MEANS = [form for form in FORMS if form not in WINDOWS]
SHAPES = [(1, 1), (1, 8), (8, 1), (6, 12), (13, 5)]


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, Stats(col_norm=torch.rand(columns, generator=generator) + 0.1)


def norm(stats: Stats) -> Tensor:
    assert stats.col_norm is not None
    return stats.col_norm


def assert_close(score: Tensor, expected: Tensor) -> None:
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), expected.double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_simple_scores(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, stats = layer(*shape)
    weight = weight.to(dtype)
    assert_close(Magnitude().score(weight, stats), weight.double().abs())
    assert_close(Wanda().score(weight, stats), weight.double().abs() * norm(stats))
    assert_close(RIA(0.7).score(weight, stats), reference.ria(weight, norm(stats), 0.7))


@pytest.mark.parametrize("form", WINDOWS)
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9, 15, 41])
@pytest.mark.parametrize("shape", SHAPES)
def test_crepe(shape: tuple[int, int], k: int, form: Neighbourhood) -> None:
    weight, stats = layer(*shape)
    method = Crepe(alpha=0.8, beta=1.3, gamma=0.6, kernel_size=k, exponent=0.9, neighbourhood=form)
    expected = reference.crepe(weight, norm(stats), alpha=0.8, beta=1.3, gamma=0.6, k=k, exponent=0.9, form=form)
    assert_close(method.score(weight, stats), expected)


@pytest.mark.parametrize("form", MEANS)
@pytest.mark.parametrize("k", [2, 4, 8, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_means_without_locality(shape: tuple[int, int], k: int, form: Neighbourhood) -> None:
    weight, stats = layer(*shape)
    size = k if form == "group" else 7
    method = Crepe(alpha=0.8, beta=1.3, gamma=0.6, kernel_size=size, exponent=0.9, neighbourhood=form)
    expected = reference.crepe(weight, norm(stats), alpha=0.8, beta=1.3, gamma=0.6, k=size, exponent=0.9, form=form)
    assert_close(method.score(weight, stats), expected)


@pytest.mark.parametrize("form", FORMS)
def test_neighbourhoods_mutate_nothing(form: Neighbourhood) -> None:
    weight, _ = layer(40, 24)
    relative = relative_importance(weight)
    before = weight.clone(), relative.clone()
    assert not torch.equal(with_neighbourhood(relative, weight, form, 0.5, 4 if form == "group" else 5), relative)
    assert torch.equal(weight, before[0]) and torch.equal(relative, before[1])


# Masks of CRePE's shipped presets at 2:4 on this layer, as the version that had windows alone chose them.
CHOSEN = {"default": "b131a3f3fb95578b", "pho": "591a3bc9b8f85355", "ria": "28a714cb44be962c"}


@pytest.mark.parametrize("preset", CHOSEN)
def test_scores_of_shipped_presets_stay_bit_for_bit(preset: str) -> None:
    weight, stats = layer(96, 160)
    method = prune_config(preset=preset).method
    assert isinstance(method, ScoreMethod)
    mask = select(method.score(weight, stats), NM(2, 4))
    assert hashlib.sha256(mask.numpy().tobytes()).hexdigest()[:16] == CHOSEN[preset]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 9)),
    alpha=st.floats(0, 4),
    beta=st.floats(0, 4),
    gamma=st.floats(0.01, 8),
    half=st.integers(0, 6),
    exponent=st.floats(0, 2),
    form=st.sampled_from(FORMS),
    zeroed=st.booleans(),
)
def test_crepe_property(
    shape: tuple[int, int], alpha: float, beta: float, gamma: float, half: int, exponent: float, form: Neighbourhood,
    zeroed: bool,
) -> None:  # fmt: skip
    weight, stats = layer(*shape, seed=half)
    if zeroed:
        weight[0], weight[:, -1] = 0, 0
    k = 2 * half + (2 if form == "group" else 1)
    method = Crepe(alpha, beta, gamma, k, exponent, form)
    expected = reference.crepe(
        weight, norm(stats), alpha=alpha, beta=beta, gamma=gamma, k=k, exponent=exponent, form=form
    )
    torch.testing.assert_close(method.score(weight, stats).double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_crepe_without_neighbourhood_is_ria_bit_for_bit(
    form: Neighbourhood, dtype: torch.dtype, exponent: float
) -> None:
    weight, stats = layer(150, 700)
    weight = weight.to(dtype)
    crepe = Crepe(alpha=1, beta=1, gamma=0, kernel_size=5 + (form == "group"), exponent=exponent, neighbourhood=form)
    assert torch.equal(crepe.score(weight, stats), RIA(exponent).score(weight, stats))


def test_alpha_is_the_row_term_and_beta_the_column_term() -> None:
    weight, stats = torch.tensor([[1.0, 3.0], [1.0, 1.0]]), Stats(col_norm=torch.ones(2))
    row = Crepe(alpha=1, beta=0, gamma=0).score(weight, stats)
    column = Crepe(alpha=0, beta=1, gamma=0).score(weight, stats)
    assert row.tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert column.tolist() == [[0.5, 0.75], [0.5, 0.25]]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sparsegpt"])
def test_zeros_give_no_nan_and_inputs_stay(name: str) -> None:
    weight, stats = layer(12, 16)
    weight[3], weight[:, 5], weight[6:, 8:] = 0, 0, 0
    norm(stats)[2] = 0
    before, norm_before = weight.clone(), norm(stats).clone()
    for candidate in [weight, torch.zeros_like(weight), weight * 1e-38]:
        method = get_method(name)
        assert isinstance(method, ScoreMethod)
        score = method.score(candidate, stats)
        assert score.isfinite().all()
        assert (score[candidate == 0] >= 0).all()
    assert torch.equal(weight, before)
    assert torch.equal(norm(stats), norm_before)


@pytest.mark.parametrize("form", FORMS)
def test_transposed_weight(form: Neighbourhood) -> None:
    weight, stats = layer(9, 14)
    stored = weight.t().contiguous()
    method = Crepe(gamma=0.3, kernel_size=4 if form == "group" else 7, neighbourhood=form)
    torch.testing.assert_close(method.score(stored.t(), stats), method.score(weight, stats))


@pytest.mark.parametrize("k", [3, 7, 21])
def test_box_sums_across_chunks_do_not_cancel(k: int) -> None:
    """Several chunks of rows, and values over many orders of magnitude."""
    columns = 4096
    values = torch.logspace(-12, 0, 3 * CHUNK // columns * columns).view(-1, columns).flip(1)
    sums = torch.cat([part for _, part in box_sums(values, k)])
    window = torch.ones(1, 1, k, k, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(values.double()[None, None], window, padding=k // 2)[0, 0]
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [Wanda(), RIA(), Crepe(gamma=0.3)])
def test_statistics_are_checked(method: ScoreMethod) -> None:
    weight, _ = layer(4, 8)
    with pytest.raises(CalibrationError, match="was not collected"):
        method.score(weight, Stats())
    with pytest.raises(CalibrationError, match="the weight needs"):
        method.score(weight, Stats(col_norm=torch.ones(7)))
