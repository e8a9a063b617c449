"""CRePE's neighbourhoods: what is added to a weight's relative importance R for what stands around it.

R is (out, in) fp32, A = |W| of the same shape, k the side of a window or the columns of a group:

ratio    c_k * A_ij / (sum of A over the k x k window around i, j)     c_k = k^2 (1/in + 1/out) / 2
smooth   mean of R over that window
group    mean of R over the k columns of row i that j's N:M group has
row      mean of R over row i
column   mean of R over column j
matrix   mean of R over the matrix

The first two are local, as the paper has them; a window includes its centre, outside the matrix `ratio` adds zeros and
`smooth` averages only what exists. c_k brings the ratio to the size of a row or column term, so that gamma means the
same for every shape. The others are means that know no distance; they cost one pass over R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .ria import SUM_FLOOR

Window = Literal["ratio", "smooth"]
Neighbourhood = Literal["ratio", "smooth", "group", "row", "column", "matrix"]
CHUNK = 65536  # entries filtered at a time, so that all passes over them stay in the cache


def with_neighbourhood(relative: Tensor, weight: Tensor, form: Neighbourhood, gamma: float, size: int) -> Tensor:
    """`relative` + gamma * its neighbourhood of this form -> new tensor (out, in) fp32.

    weight: (out, in), any float dtype, which `relative` was made of. size: k. Mutates nothing.
    """
    if form == "ratio":
        return _plus_ratio(relative, weight, gamma, size)
    if form == "smooth":
        return _plus_mean(relative, gamma, size)
    return relative.add(MEANS[form](relative, size), alpha=gamma)


def _group_mean(values: Tensor, size: int) -> Tensor:
    """(out, in): means over `size` consecutive columns, the last ones over what is left."""
    size = min(size, values.shape[1])
    means = F.avg_pool1d(values, size, size, ceil_mode=True)
    return means.repeat_interleave(size, dim=1)[:, : values.shape[1]]


MEANS: dict[Neighbourhood, Callable[[Tensor, int], Tensor]] = {
    "group": _group_mean,
    "row": lambda values, size: values.mean(1, keepdim=True),
    "column": lambda values, size: values.mean(0, keepdim=True),
    "matrix": lambda values, size: values.mean(),
}


def box_sums(values: Tensor, kernel_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, sums) in order: for each entry of `values[rows]` the sum over the window centred on it.

    `values` (out, in); windows have the odd side `kernel_size` and zeros outside the matrix. Only additions, so nothing
    cancels, and about 2 log2(kernel_size) of them per axis: windows of 1, 2, 4, ... entries are doubled and joined.
    Everything happens on flat zero-padded rows, where a step down is a step of one padded row. A window larger than
    the matrix is cut to what it can reach.
    """
    rows, columns = values.shape
    down, right = (min(kernel_size // 2, size - 1) for size in (rows, columns))
    pitch = columns + 2 * right
    height = max(1, CHUNK // pitch)
    for start in range(0, rows, height):
        end = min(start + height, rows)
        first, last = max(0, start - down), min(rows, end + down)
        padded = F.pad(values[first:last], (right, right, down - (start - first), down - (last - end)))
        sums = _window_sums(_window_sums(padded.view(-1), 2 * right + 1, 1), 2 * down + 1, pitch)
        yield slice(start, end), sums.as_strided((end - start, columns), (pitch, 1))


def _window_sums(flat: Tensor, width: int, step: int) -> Tensor:
    """y[t] = flat[t] + flat[t + step] + ... (`width` terms, odd), for every t where all terms exist."""
    total, power, size = flat, flat, 1
    while 2 * size <= width:
        power = power[: -size * step] + power[size * step :]
        size *= 2
        if width & size:
            part = power[(width & (size - 1)) * step :]
            total = total[: len(part)] + part
    return total


def _plus_ratio(score: Tensor, weight: Tensor, gamma: float, kernel_size: int) -> Tensor:
    """`score` + gamma * c_k * A / (window sum of A) -> new tensor."""
    score = score.clone()
    magnitude = weight.detach().abs().float()
    scale = kernel_size**2 * (1 / weight.shape[1] + 1 / weight.shape[0]) / 2
    for rows, sums in box_sums(magnitude, kernel_size):
        score[rows].addcdiv_(magnitude[rows], sums.clamp_(min=SUM_FLOOR), value=gamma * scale)
    return score


def _plus_mean(score: Tensor, gamma: float, kernel_size: int) -> Tensor:
    """`score` + gamma * (mean of `score` over the entries of the window that exist) -> new tensor."""
    down, right = (_window_counts(size, kernel_size // 2, score.device) for size in score.shape)
    result = torch.empty_like(score)
    for rows, sums in box_sums(score, kernel_size):
        torch.addcmul(score[rows], sums.mul_(gamma / down[rows].unsqueeze(1)), 1 / right, out=result[rows])
    return result


def _window_counts(size: int, reach: int, device: torch.device) -> Tensor:
    """(size,) fp32: how many positions within `reach` of each position exist."""
    position = torch.arange(size, device=device)
    return ((position + reach).clamp(max=size - 1) - (position - reach).clamp(min=0) + 1).float()
