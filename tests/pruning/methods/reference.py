"""Slow fp64 loop versions of every method, written from the formulas and sharing nothing with the package."""

from __future__ import annotations

import torch
from torch import Tensor


def ria(weight: Tensor, col_norm: Tensor, exponent: float, alpha: float = 1, beta: float = 1) -> Tensor:
    return _relative(weight.double().abs(), alpha, beta) * col_norm.double() ** exponent


def crepe(
    weight: Tensor, col_norm: Tensor, *, alpha: float, beta: float, gamma: float, k: int, exponent: float, form: str
) -> Tensor:
    magnitude = weight.double().abs()
    rows, columns = magnitude.shape
    relative = _relative(magnitude, alpha, beta)
    scale = k * k * (1 / columns + 1 / rows) / 2
    score = torch.zeros_like(magnitude)
    for i in range(rows):
        for j in range(columns):
            window = (slice(max(0, i - k // 2), i + k // 2 + 1), slice(max(0, j - k // 2), j + k // 2 + 1))
            tile = (i, slice(j // k * k, j // k * k + k))
            means = {"group": tile, "row": (i, slice(None)), "column": (slice(None), j), "matrix": slice(None)}
            if form in means:
                neighbours = relative[means[form]].mean()
            elif form == "smooth":
                neighbours = relative[window].mean()
            else:
                total = magnitude[window].sum()
                neighbours = scale * magnitude[i, j] / total if total else total
            score[i, j] = relative[i, j] + gamma * neighbours
    return score * col_norm.double() ** exponent


def _relative(magnitude: Tensor, alpha: float, beta: float) -> Tensor:
    result = torch.zeros_like(magnitude)
    for i in range(len(magnitude)):
        for j in range(magnitude.shape[1]):
            row, column = magnitude[i].sum(), magnitude[:, j].sum()
            result[i, j] = (alpha * magnitude[i, j] / row if row else 0) + (
                beta * magnitude[i, j] / column if column else 0
            )
    return result


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    *,
    damping: float,
    block: int,
    nm: tuple[int, int] | None,
    zeros: int = 0,
    rowwise: bool = True,
) -> tuple[Tensor, Tensor]:
    """`zeros` per row or in the matrix, used when `nm` is None -> (weight, keep mask)."""
    w, h = weight.double().clone(), hessian.double().clone()
    rows, columns = w.shape
    for j in range(columns):
        if h[j, j] == 0:
            h[j, j] = 1
            w[:, j] = 0
    h += damping * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    keep = torch.ones(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if nm is not None and j % nm[1] == 0:
            _prune_smallest(w, u, keep, range(j, j + nm[1]), nm[1] - nm[0], rowwise=True)
        if nm is None and j % block == 0:
            end = min(j + block, columns)
            _prune_smallest(w, u, keep, range(j, end), zeros * end // columns - zeros * j // columns, rowwise)
        for i in range(rows):
            error = 0.0 if keep[i, j] else w[i, j].item() / u[j, j].item()
            w[i, j:] -= error * u[j, j:]
    return w * keep, keep


def _prune_smallest(w: Tensor, u: Tensor, keep: Tensor, span: range, count: int, rowwise: bool) -> None:
    rows = [[i] for i in range(len(w))] if rowwise else [list(range(len(w)))]
    for group in rows:
        entries = [(float(w[i, j] ** 2 / u[j, j] ** 2), -j, -i) for i in group for j in span]
        for _, j, i in sorted(entries)[:count]:
            keep[-i, -j] = False


def gptq(
    weight: Tensor,
    keep: Tensor,
    gram: Tensor,
    scales: Tensor,
    bits: int,
    group: int,
    dtype: torch.dtype,
    *,
    damping: float,
) -> Tensor:
    """GPTQ with given scales (out, groups) under a mask, one weight at a time -> fp64 (out, in)."""
    w, h = weight.double().clone(), gram.double().clone()
    rows, columns = w.shape
    h += damping * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for j in range(columns):
        for i in range(rows):
            scale = float(scales[i, j // group])
            code = min(max(round(float(w[i, j]) / scale), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
            goal = float(torch.tensor(code * scale).to(dtype)) if keep[i, j] else 0.0
            error = (float(w[i, j]) - goal) / float(u[j, j])
            w[i, j + 1 :] -= error * u[j, j + 1 :]
            w[i, j] = goal
    return w
