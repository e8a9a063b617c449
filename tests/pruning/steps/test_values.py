"""Values as a step: the sweep behind a reconstruction loses less than rounding, on the aim that both were given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crepe_deploy.errors import CalibrationError, ConfigError
from crepe_deploy.grid import codes_of
from crepe_deploy.model.stats import Stats
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.steps.reconstruct import Admm
from crepe_deploy.pruning.steps.values import VALUES, Int4, Int8
from crepe_deploy.select import select


def layer(seed: int) -> tuple[Tensor, Tensor, Tensor, Stats]:
    """Weight (32, 128), inputs behind pruned layers and in the dense model (tokens, 128), and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(128, 128, generator=generator) / 128**0.5 + torch.eye(128)
    dense = torch.randn(512, 128, generator=generator) @ mixing
    inputs = dense + 0.1 * torch.randn(512, 128, generator=generator)
    stats = Stats(hessian=2 * inputs.T @ inputs, cross=2 * dense.T @ inputs)
    return torch.randn(32, 128, generator=generator) / 50, inputs, dense, stats


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("step", [Int8(), Int4(), Int4(group=32)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
def test_behind_admm_the_sweep_is_nearer_to_the_dense_output(step: Int8, scale: float, seed: int) -> None:
    weight, inputs, dense, stats = layer(seed)
    pattern = NM(16, 32)
    mask = select(weight.abs(), pattern)
    solution = Admm()(weight, weight * mask, mask, stats, pattern)
    start = solution.weight * scale
    lost = {}
    for rounding in ("sweep", "nearest"):
        found, _ = replace(step, rounding=rounding)(start, solution.mask, stats, torch.bfloat16)
        assert not found.weight[~solution.mask].any()
        codes_of(found.weight.bfloat16(), found.scales.bfloat16(), step.grid(torch.bfloat16))
        reached = found.weight.double() / scale
        lost[rounding] = float((dense.double() @ weight.double().T - inputs.double() @ reached.T).square().sum())
    assert lost["sweep"] < lost["nearest"]


def test_rounding_to_nearest_reads_no_statistics() -> None:
    weight, _, _, stats = layer(0)
    mask = torch.ones_like(weight, dtype=torch.bool)
    assert Int4().needs == {"hessian"}
    assert Int4(rounding="nearest").needs == frozenset()
    found, damping = Int4(rounding="nearest")(weight, mask, Stats(), torch.bfloat16)
    assert damping == 0
    assert found.scales.shape == (32, 1)
    assert Int8()(weight, mask, stats, torch.bfloat16)[1] == 0.01
    with pytest.raises(CalibrationError, match="hessian"):
        Int4()(weight, mask, Stats(), torch.bfloat16)


def test_what_cannot_work_is_refused() -> None:
    assert set(VALUES) == {"int8", "int4"}
    with pytest.raises(ConfigError, match="multiple of 32"):
        Int4(group=48)
    with pytest.raises(ConfigError, match="rounding 'up' is unknown; known: sweep, nearest"):
        Int8(rounding="up")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="damping"):
        Int8(damping=0)
