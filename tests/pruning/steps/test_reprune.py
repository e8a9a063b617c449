"""Re-pruning against a slow loop; exact counts; what each step promises about the error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crepe_deploy.errors import CalibrationError, ConfigError
from crepe_deploy.model.stats import Stats
from crepe_deploy.pattern import NM, Pattern, Unstructured
from crepe_deploy.pruning.methods.ria import RIA
from crepe_deploy.pruning.methods.wanda import Wanda
from crepe_deploy.pruning.steps.reprune import REPRUNERS, DSnoT, DSnoTRia, Swaps
from crepe_deploy.select import select

PATTERNS: list[Pattern] = [NM(2, 4), NM(1, 4), NM(16, 32), Unstructured(0.5), Unstructured(0.6, "matrix")]


def layer(rows: int = 12, columns: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Stats]:
    """Weight (rows, columns), inputs with means (tokens, columns) as 4 sequences, and their statistics."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    inputs += 0.5 * torch.randn(columns, generator=generator)
    stats = Stats(
        col_norm=(inputs.square().sum(0) / 4).sqrt(),
        hessian=2 / 4 * inputs.T @ inputs,
        total=inputs.sum(0) / 4,
        variance=inputs.var(0, correction=0),
    )
    return torch.randn(rows, columns, generator=generator), inputs, stats


def slow_dsnot(weight: Tensor, mask: Tensor, stats: Stats, step: DSnoT, width: int | None) -> Tensor:
    """The rule, one weight at a time, in fp64 where it decides."""
    assert stats.total is not None and stats.variance is not None
    score = (Wanda() if step.order == "wanda" else RIA()).score(weight, stats)
    kept = mask.clone()
    for i in range(len(weight)):
        m = [float(weight[i, j] * stats.total[j]) for j in range(weight.shape[1])]
        key = [m[j] / float(stats.variance[j]) ** step.power for j in range(len(m))]
        growable = [j for j in range(len(m)) if not mask[i, j]]
        prunable = [j for j in range(len(m)) if mask[i, j]]
        error = sum(m[j] for j in growable)
        for _ in range(step.max_cycles):
            sign = 1 if error > 0 else -1
            useful = [j for j in growable if sign * m[j] > 0]
            if abs(error) <= step.enough or not useful:
                break
            grown = max(useful, key=lambda j: sign * key[j])
            growable.remove(grown)
            if width is None:
                partners = [j for j in prunable if sign * m[j] < 0]
            else:
                partners = [j for j in prunable if j // width == grown // width]
            if not partners:
                continue
            pruned = min(partners, key=lambda j: float(score[i, j]))
            after = error + m[pruned] - m[grown]
            if abs(after) < abs(error) and (width is None or after * sign >= 0):
                kept[i, grown], kept[i, pruned], error = True, False, after
                prunable.remove(pruned)
    return kept


@pytest.mark.parametrize("step", [DSnoT(), DSnoTRia(), DSnoT(max_cycles=3), DSnoT(power=0)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dsnot_is_the_slow_loop(pattern: Pattern, step: DSnoT) -> None:
    weight, _, stats = layer()
    mask = select(weight.abs(), pattern)
    found, notes = step(weight, mask, stats, pattern)
    assert torch.equal(found, slow_dsnot(weight, mask, stats, step, pattern.m if isinstance(pattern, NM) else None))
    assert notes["swaps"] == int((found & ~mask).sum()) > 0


def counts(mask: Tensor, pattern: Pattern) -> Tensor:
    return mask.view(len(mask), -1, pattern.m if isinstance(pattern, NM) else mask.shape[1]).sum(-1)


@pytest.mark.parametrize("name", ["dsnot", "dsnot-ria"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_counts_hold_and_no_row_shifts_further(name: str, pattern: Pattern) -> None:
    weight, inputs, stats = layer(rows=40)
    mask = select(weight.abs(), pattern)
    found, notes = REPRUNERS[name]()(weight, mask, stats, pattern)
    assert torch.equal(counts(found, pattern), counts(mask, pattern))
    before, after = ((inputs @ (weight * ~kept).T).sum(0).abs() for kept in (mask, found))
    assert (after <= before * (1 + 1e-4) + 1e-3).all()
    assert notes["mean_shift_left"] == pytest.approx(float(after.mean() / before.mean()), rel=1e-2)
    assert notes["mean_shift_left"] < 0.7


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(16, 32)], ids=str)
def test_swaps_never_raise_the_output_error_of_a_row(pattern: NM) -> None:
    weight, inputs, stats = layer(rows=40)
    mask = select(weight.abs(), pattern)
    found, notes = Swaps()(weight, mask, stats, pattern)
    assert torch.equal(counts(found, pattern), counts(mask, pattern))
    assert notes["swaps"] > 0
    before, after = ((inputs.double() @ (weight * ~kept).double().T).square().sum(0) for kept in (mask, found))
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() < 0.9 * before.sum()


def test_swaps_end_where_no_single_swap_helps() -> None:
    weight, inputs, stats = layer(rows=3, columns=16)
    found, _ = Swaps(sweeps=50)(weight, select(weight.abs(), NM(2, 4)), stats, NM(2, 4))
    reached = (inputs @ (weight * ~found).T).square().sum(0)
    for i in range(3):
        for start in range(0, 16, 4):
            for pruned in range(start, start + 4):
                for grown in range(start, start + 4):
                    if found[i, pruned] and not found[i, grown]:
                        other = found[i].clone()
                        other[pruned], other[grown] = False, True
                        assert (inputs @ (weight[i] * ~other)).square().sum() > reached[i] * (1 - 1e-4)


def test_arguments_are_left_alone() -> None:
    weight, _, stats = layer()
    mask = select(weight.abs(), NM(2, 4))
    before = (weight.clone(), mask.clone())
    for name in REPRUNERS:
        REPRUNERS[name]()(weight, mask, stats, NM(2, 4))
    assert torch.equal(weight, before[0])
    assert torch.equal(mask, before[1])


def test_what_cannot_work_is_refused() -> None:
    weight, _, stats = layer()
    mask = select(weight.abs(), Unstructured(0.5))
    with pytest.raises(ConfigError, match=r"N:M groups, not in 0\.5/row; use dsnot"):
        Swaps()(weight, mask, stats, Unstructured(0.5))
    with pytest.raises(CalibrationError, match="moments"):
        DSnoT()(weight, mask, Stats(col_norm=stats.col_norm), NM(2, 4))
    with pytest.raises(ConfigError, match="order 'best' is unknown; known: wanda, ria"):
        DSnoT(order="best")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="max_cycles"):
        DSnoT(max_cycles=0)
