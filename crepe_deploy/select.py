"""Mask selection: a score and a pattern in, a boolean keep mask with exact counts out.

Every pattern is "keep the largest of each group", where a group is M consecutive columns, a row or the whole matrix.
The mechanism: the largest score that must go is the group's threshold, everything above it stays, and equal scores
at the threshold stay from the lowest column on until the count is exact. Groups of up to `RANKED_GROUP` columns count
for every entry how many of its group beat it, which is several times faster for so few.

A score on the CPU is worked on in numpy, whose comparisons and partitions are several times faster than torch's there;
one on another device stays there and is sorted. Both give the same mask of the same score.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import NumericalError, PatternError
from .pattern import NM, Pattern, check_divides, fraction_of

Array: TypeAlias = npt.NDArray[Any]
Mask: TypeAlias = npt.NDArray[np.bool_]

NAN = "the score contains NaN: the weight or its calibration statistics are not finite"
RANKED_GROUP = 8  # above it, sorting each group is faster than comparing all pairs (measured)
CHUNK = 32768  # entries per step of the pairwise comparison: scores, ranks and flags stay in the L2 cache


def select(score: Tensor, pattern: Pattern) -> Tensor:
    """Choose what `pattern` keeps of `score` (out, in), higher = keep -> bool (out, in), True = keep.

    Counts are exact whatever the ties: N of every M columns, or `fraction_of` zeros per row or per matrix. Equal
    scores stay from the lowest column on, then from the lowest row on. Infinite scores are ordered like any other.
    Raises PatternError if the pattern does not fit the shape, NumericalError if a score is NaN.
    """
    if isinstance(pattern, NM):
        return largest_per_group(score, pattern.n, pattern.m)
    if pattern.granularity == "row":
        return largest_per_row(score, score.shape[-1] - fraction_of(score.shape[-1], pattern.sparsity))
    return largest_in_matrix(score, score.numel() - fraction_of(score.numel(), pattern.sparsity))


def largest_per_group(score: Tensor, n: int, m: int) -> Tensor:
    """Keep the `n` largest of every `m` consecutive columns of each row; otherwise as `select`."""
    check_divides(NM(n, m), "score", _checked(score).shape[1])
    if score.device.type != "cpu":
        return _keep_sorted(score.reshape(-1, m), n).view(score.shape)
    groups = _host(score).reshape(-1, m)
    return _mask(_keep_ranked(groups, n) if m <= RANKED_GROUP else _keep_largest(groups, n), score)


def largest_per_row(score: Tensor, keep: int) -> Tensor:
    """Keep the `keep` largest of each row; otherwise as `select`."""
    if _checked(score).device.type != "cpu":
        return _keep_sorted(score, keep)
    return _mask(_keep_largest(_host(score), keep), score)


def largest_in_matrix(score: Tensor, keep: int) -> Tensor:
    """Keep the `keep` largest of the whole matrix; otherwise as `select`."""
    if _checked(score).device.type != "cpu":  # transposed: the lowest column first, then the lowest row
        return _keep_sorted(score.T.reshape(1, -1), keep).view(score.shape[::-1]).T.contiguous()
    values = _host(score)
    mask = _above_threshold(values.reshape(1, -1), keep)
    if mask is None:
        return _mask(np.full(values.shape, keep > 0), score)
    above, threshold = mask[0].reshape(values.shape), mask[1]
    missing = keep - np.count_nonzero(above)
    if missing:
        columns, rows = np.nonzero((values == threshold).T)  # transposed: the lowest column first, then the lowest row
        above[rows[:missing], columns[:missing]] = True
    return _mask(above, score)


def _checked(score: Tensor) -> Tensor:
    if score.ndim != 2 or score.numel() == 0:
        raise PatternError(f"a score has shape (out, in) and is not empty, got {tuple(score.shape)}")
    return score


def _keep_sorted(score: Tensor, keep: int) -> Tensor:
    """The `keep` largest of each row (rows, width), equal values from the left, where the score is."""
    if bool(score.isnan().any()):
        raise NumericalError(NAN)
    order = (score.detach() + 0.0).sort(dim=1, descending=True, stable=True).indices  # + 0.0: negative zeros are zeros
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :keep], True)


def _host(score: Tensor) -> Array:
    """`score` as a C-contiguous host array, checked for NaN."""
    values = score.detach()
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    array: Array = values.contiguous().numpy()
    if np.isnan(array.max()):  # max propagates NaN
        raise NumericalError(NAN)
    return array


def _mask(keep: Mask, score: Tensor) -> Tensor:
    return torch.from_numpy(keep.reshape(score.shape))


def _above_threshold(values: Array, keep: int) -> tuple[Mask, Array] | None:
    """What exceeds the largest score to go, per row, and that score (rows, 1); None if all or nothing is kept."""
    width = values.shape[1]
    if not 0 < keep < width:
        return None
    last = width - keep - 1
    # Whole sorts of short rows beat partial ones: numpy has a vectorised network for them.
    order = np.sort(values, axis=1) if width <= 64 else np.partition(values, last, axis=1)
    threshold = order[:, last : last + 1]
    return values > threshold, threshold


def _keep_largest(values: Array, keep: int) -> Mask:
    """The `keep` largest of each row (rows, width), equal values from the left."""
    above = _above_threshold(values, keep)
    if above is None:
        return np.full(values.shape, keep > 0)
    mask, threshold = above
    if np.count_nonzero(mask) < keep * len(values):  # at most `keep` per row exceed it, so the total tells
        missing = keep - np.count_nonzero(mask, axis=1)
        rows = np.flatnonzero(missing)
        tied = values[rows] == threshold[rows]
        tied &= np.cumsum(tied, axis=1, dtype=np.int32) <= missing[rows, None]
        mask[rows] |= tied
    return mask


@cache
def _pair_tables(m: int, length: int) -> tuple[Array, tuple[Mask, ...]]:
    """For a flat run of groups of `m`: how many follow each entry in its group, and who has a partner d further on."""
    position = np.tile(np.arange(m, dtype=np.uint8), length // m)
    return m - 1 - position, tuple(position < m - distance for distance in range(1, m))


def _keep_ranked(groups: Array, n: int) -> Mask:
    """The `n` largest of each row of `groups` (rows, m), equal values from the left, by counting who beats whom.

    Works on the flat array: entry i meets entry i + d for d = 1..m-1 in one contiguous comparison. An entry starts
    as beaten by everyone after it; each pair the left one wins (it wins ties) moves that point to the right one.
    """
    m, flat = groups.shape[1], groups.reshape(-1)
    length = CHUNK // m * m
    following, has_partner = _pair_tables(m, length)
    keep = np.empty(flat.size, dtype=np.bool_)
    beaten, won = np.empty(length, dtype=np.uint8), np.empty(length, dtype=np.bool_)
    for start in range(0, flat.size, length):
        values = flat[start : start + length]
        count = beaten[: values.size]
        count[:] = following[: values.size]
        for distance in range(1, m):
            left_wins = won[: values.size - distance]
            np.greater_equal(values[:-distance], values[distance:], out=left_wins)
            np.logical_and(left_wins, has_partner[distance - 1][: left_wins.size], out=left_wins)
            points = left_wins.view(np.uint8)
            count[distance:] += points
            count[:-distance] -= points
        np.less(count, n, out=keep[start : start + length])
    return keep
