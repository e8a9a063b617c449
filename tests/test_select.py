"""Mask selection: exact counts, the tie rule, and a slow reference that sorts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crepe_deploy.errors import NumericalError, PatternError
from crepe_deploy.pattern import NM, Pattern, Unstructured
from crepe_deploy.select import largest_in_matrix, largest_per_group, largest_per_row, select


def keep_by_sorting(entries: list[tuple[float, int, int]], keep: int) -> set[tuple[int, int]]:
    """`entries` are (score, row, column): the `keep` largest, equal scores by column and then by row."""
    ranked = sorted(entries, key=lambda entry: (-entry[0], entry[2], entry[1]))
    return {(row, column) for _, row, column in ranked[:keep]}


def reference(score: Tensor, pattern: Pattern) -> Tensor:
    rows, columns = score.shape
    entries = [[(float(score[i, j]), i, j) for j in range(columns)] for i in range(rows)]
    kept: set[tuple[int, int]] = set()
    if isinstance(pattern, NM):
        for row in entries:
            for start in range(0, columns, pattern.m):
                kept |= keep_by_sorting(row[start : start + pattern.m], pattern.n)
    elif pattern.granularity == "row":
        for row in entries:
            kept |= keep_by_sorting(row, columns - int(round(columns * pattern.sparsity, 6)))
    else:
        kept = keep_by_sorting(
            [entry for row in entries for entry in row], score.numel() - int(round(score.numel() * pattern.sparsity, 6))
        )
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for row_index, column in kept:
        mask[row_index, column] = True
    return mask


SCORES = {
    "random": lambda rows, columns: torch.rand(rows, columns),
    "signed": lambda rows, columns: torch.randn(rows, columns),
    "few values": lambda rows, columns: torch.randint(0, 3, (rows, columns)).float(),
    "all equal": lambda rows, columns: torch.zeros(rows, columns),
    "signed zeros": lambda rows, columns: torch.zeros(rows, columns) * torch.randn(rows, columns).sign(),
    "infinities": lambda rows, columns: torch.tensor([math.inf, -math.inf, 0.0])[torch.randint(0, 3, (rows, columns))],
    "bfloat16": lambda rows, columns: torch.rand(rows, columns).bfloat16(),
    "float64": lambda rows, columns: 1 + torch.rand(rows, columns, dtype=torch.float64) * 1e-12,
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    ("rows", "columns", "pattern"),
    [
        (5, 8, NM(2, 4)),
        (3, 12, NM(1, 4)),
        (3, 12, NM(3, 4)),
        (4, 15, NM(2, 5)),
        (1, 2, NM(1, 2)),
        (4, 16, NM(4, 8)),
        (2, 9, NM(4, 9)),
        (3, 32, NM(8, 16)),
        (3, 32, NM(16, 32)),
        (2, 32, NM(1, 32)),
        (2, 64, NM(31, 32)),
    ]
    + [
        (rows, columns, Unstructured(sparsity, granularity))
        for granularity in ("row", "matrix")
        for rows, columns in ((1, 1), (1, 7), (7, 1), (5, 10), (3, 100))
        for sparsity in (0, 0.29, 0.5, 0.7, 0.95)
    ],
)
def test_matches_sorting(kind: str, rows: int, columns: int, pattern: Pattern) -> None:
    torch.manual_seed(rows * columns)
    score = SCORES[kind](rows, columns)
    before = score.clone()
    mask = select(score, pattern)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, reference(score, pattern))
    assert torch.equal(score, before)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_matches_sorting_property(data: st.DataObject) -> None:
    m = data.draw(st.integers(2, 32), label="m")
    rows, groups = data.draw(st.integers(1, 4), label="rows"), data.draw(st.integers(1, 3), label="groups")
    value = st.one_of(st.integers(-2, 2).map(float), st.floats(width=32, allow_nan=False))
    values = data.draw(st.lists(value, min_size=rows * groups * m, max_size=rows * groups * m), label="values")
    score = torch.tensor(values).view(rows, groups * m)
    sparsity = data.draw(st.integers(0, 99), label="percent") / 100
    nm = NM(data.draw(st.integers(1, m - 1), label="n"), m)
    patterns: list[Pattern] = [nm, Unstructured(sparsity, "row"), Unstructured(sparsity, "matrix")]
    for pattern in patterns:
        assert torch.equal(select(score, pattern), reference(score, pattern)), pattern


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (4, 8), (5, 7), (8, 16)])
def test_groups_across_chunk_borders(n: int, m: int) -> None:
    """More entries than one step of the pairwise comparison takes, and not a multiple of it."""
    torch.manual_seed(0)
    score = torch.randint(0, 5, (67, m * 211)).float()
    order = score.view(-1, m).sort(dim=1, descending=True, stable=True).indices[:, :n]
    expected = torch.zeros(score.numel() // m, m, dtype=torch.bool).scatter_(1, order, True).view(score.shape)
    assert torch.equal(select(score, NM(n, m)), expected)


@pytest.mark.parametrize("granularity", ["row", "matrix"])
@pytest.mark.parametrize(
    ("columns", "sparsity", "zeros"), [(10, 0.7, 7), (100, 0.29, 29), (10, 0.1 + 0.2, 3), (7, 0.5, 3)]
)
def test_counts_are_free_of_float_error(granularity: str, columns: int, sparsity: float, zeros: int) -> None:
    mask = select(torch.rand(1, columns), Unstructured(sparsity, granularity))  # type: ignore[arg-type]
    assert int((~mask).sum()) == zeros


def test_matrix_ties_stay_by_column_then_row() -> None:
    mask = largest_in_matrix(torch.zeros(3, 4), 4)
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]


def test_keeping_nothing_and_everything() -> None:
    score = torch.rand(2, 4)
    assert not largest_per_row(score, 0).any()
    assert largest_per_row(score, 4).all()
    assert not largest_in_matrix(score, 0).any()
    assert largest_in_matrix(score, 8).all()


def test_non_contiguous_score() -> None:
    score = torch.rand(8, 6)
    assert torch.equal(select(score.t(), NM(2, 4)), select(score.t().contiguous(), NM(2, 4)))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32), Unstructured(0.5, "row"), Unstructured(0.5, "matrix")])
def test_nan_is_refused(pattern: Pattern) -> None:
    score = torch.rand(4, 32)
    score[2, 5] = math.nan
    with pytest.raises(NumericalError, match="NaN"):
        select(score, pattern)


def test_group_that_does_not_divide() -> None:
    with pytest.raises(PatternError, match="6 input columns"):
        largest_per_group(torch.rand(2, 6), 2, 4)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (2, 0), (2, 2, 4)])
def test_shape_is_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(PatternError, match="shape"):
        select(torch.rand(shape), NM(2, 4))
