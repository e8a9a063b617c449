"""Triton kernels for packed weights: one streaming skeleton, and the expansion of a whole weight.

    y[m, n] = sum_k x[m, k] W[n, k] + bias[n]

Four kinds of weight share the skeleton and differ in how a lane learns its four entries (`groups`). Few tokens (BM 1,
2 or 4) are multiplied on the ordinary cores (`products`), more on the tensor cores, one product for each of a group's
four positions, so that expanded weights need no reordering. Sums are kept in fp32. With `parts` > 1 programs share a
row block: each leaves a partial sum and the one that arrives last adds them in order, so the result does not depend on
who that was. `triton` is needed to import this module.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import GROUPS, NIBBLE, STEPS, entries, pair, to_half
from .products import add_products


@triton.jit
def _add(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The sum of a reduction. (`tl.sum`, itself compiled, could not be interpreted beside compiled kernels.)"""
    return a + b


@triton.jit
def _write(
    total: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    place: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    BIAS: tl.constexpr,
) -> tl.tensor:
    """Store sums with the bias of their rows, rounded once."""
    if BIAS:
        total += tl.load(bias + rows, mask=valid, other=0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=valid)


@triton.jit
def _finish(
    total: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    counters: tl.tensor,
    place: tl.tensor,
    rows: tl.tensor,
    valid: tl.tensor,
    size: tl.tensor,
    parts: tl.tensor,
    SHARED: tl.constexpr,
    BIAS: tl.constexpr,
) -> tl.tensor:
    """Write a block's result; when SHARED, leave the partial sum and let the last program to arrive add them all."""
    if not SHARED:
        _write(total, bias, out, place, rows, valid, BIAS)
    else:
        tl.store(partial + tl.program_id(1) * size + place, total, mask=valid, cache_modifier=".cg")
        tl.debug_barrier()  # every thread's partial sums before the one thread that says they are there
        arrived = tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel")
        if arrived == parts - 1:
            total = tl.full(total.shape, 0, tl.float32)
            for part in range(parts):
                total += tl.load(partial + part * size + place, mask=valid, other=0, cache_modifier=".cg")
            _write(total, bias, out, place, rows, valid, BIAS)
            tl.store(counters + tl.program_id(0), 0)  # as it was found, for the next call


@triton.jit
def _side_by_side(
    sums0: tl.tensor, sums1: tl.tensor, sums2: tl.tensor, sums3: tl.tensor, BM: tl.constexpr
) -> tl.tensor:
    """The row sums of each token, [BN, BM], and the tokens' numbers, [1, BM]."""
    total = tl.reduce(sums0, 1, _add)[:, None]
    token = tl.full([1, 1], 0, tl.int32)
    if BM > 1:
        token = tl.arange(0, BM)[None, :]
        total = tl.where(token == 0, total, tl.reduce(sums1, 1, _add)[:, None])
    if BM > 2:
        total = tl.where(token == 2, tl.reduce(sums2, 1, _add)[:, None], total)
        total = tl.where(token == 3, tl.reduce(sums3, 1, _add)[:, None], total)
    return total, token


@triton.jit(do_not_specialize=["M", "parts"])
def stream_few(
    x: tl.tensor,
    values: tl.tensor,
    meta: tl.tensor,
    offsets: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    counters: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    kept: tl.tensor,
    parts: tl.tensor,
    KIND: tl.constexpr,
    BF16: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    SHARED: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """At most BM = 1, 2 or 4 tokens, on the ordinary cores. Grid: row blocks, parts. M is BM or less."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = rows[:, None]
    lanes = tl.arange(0, GROUPS)[None, :]
    groups = K // 4
    supers = (groups + GROUPS * STEPS - 1) // (GROUPS * STEPS)
    sums0 = tl.full([BN, GROUPS], 0, tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for s in range(tl.program_id(1) * supers // parts, (tl.program_id(1) + 1) * supers // parts):
        planes = lanes
        if KIND == NIBBLE:
            planes = tl.load(meta + row * (supers * GROUPS) + s * GROUPS + lanes, mask=row < N, other=0)
        for t in tl.static_range(STEPS):
            first = (s * STEPS + t) * GROUPS
            group = first + lanes
            inside = (tl.full([1, GROUPS], first, tl.int32) if EVEN else group) < groups
            valid = (row < N) & inside
            e0, e1, e2, e3, word, nibble = planes, planes, planes, planes, planes, planes
            if KIND == NIBBLE:
                word, nibble = pair(values, planes, row, valid, group, t * 4, K)
            else:
                e0, e1, e2, e3 = entries(values, meta, offsets, planes, row, valid, group, t * 4, N, K, kept, KIND)
            sums0 = add_products(sums0, x, e0, e1, e2, e3, word, nibble, 0, group, inside, K, KIND == NIBBLE, BF16)
            if BM > 1:
                more = inside & (lanes * 0 + 1 < M)
                sums1 = add_products(sums1, x, e0, e1, e2, e3, word, nibble, 1, group, more, K, KIND == NIBBLE, BF16)
            if BM > 2:
                third, fourth = inside & (lanes * 0 + 2 < M), inside & (lanes * 0 + 3 < M)
                sums2 = add_products(sums2, x, e0, e1, e2, e3, word, nibble, 2, group, third, K, KIND == NIBBLE, BF16)
                sums3 = add_products(sums3, x, e0, e1, e2, e3, word, nibble, 3, group, fourth, K, KIND == NIBBLE, BF16)
    total, token = _side_by_side(sums0, sums1, sums2, sums3, BM)
    valid = (row < N) & (token < M)
    _finish(total, bias, out, partial, counters, token * N + row, row + token * 0, valid, M * N, parts, SHARED, BIAS)


@triton.jit(do_not_specialize=["M", "parts"])
def stream_many(
    x: tl.tensor,
    values: tl.tensor,
    meta: tl.tensor,
    offsets: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    counters: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    kept: tl.tensor,
    parts: tl.tensor,
    KIND: tl.constexpr,
    BF16: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    SHARED: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
) -> None:
    """Blocks of BM >= 16 tokens, on the tensor cores. Grid: row blocks, parts, token blocks; parts > 1 if M <= BM."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = rows[:, None]
    token = (tl.program_id(2) * BM + tl.arange(0, BM))[None, :]
    lanes = tl.arange(0, GROUPS)[None, :]
    down = tl.arange(0, GROUPS)[:, None]
    groups = K // 4
    supers = (groups + GROUPS * STEPS - 1) // (GROUPS * STEPS)
    total = tl.full([BN, BM], 0, tl.float32)
    for s in range(tl.program_id(1) * supers // parts, (tl.program_id(1) + 1) * supers // parts):
        planes = lanes
        if KIND == NIBBLE:
            planes = tl.load(meta + row * (supers * GROUPS) + s * GROUPS + lanes, mask=row < N, other=0)
        for t in tl.static_range(STEPS):
            first = (s * STEPS + t) * GROUPS
            group = first + lanes
            inside = (tl.full([1, GROUPS], first, tl.int32) if EVEN else group) < groups
            below = (tl.full([GROUPS, 1], first, tl.int32) if EVEN else first + down) < groups
            e0, e1, e2, e3 = entries(
                values, meta, offsets, planes, row, (row < N) & inside, group, t * 4, N, K, kept, KIND
            )
            quad = tl.load(x + token * groups + (first + down), mask=below & (token < M), other=0)
            total = tl.dot(to_half(e0, BF16), to_half(quad.to(tl.int32), BF16), total)
            total = tl.dot(to_half(e1, BF16), to_half((quad >> 16).to(tl.int32), BF16), total)
            total = tl.dot(to_half(e2, BF16), to_half((quad >> 32).to(tl.int32), BF16), total)
            total = tl.dot(to_half(e3, BF16), to_half((quad >> 48).to(tl.int32), BF16), total)
    valid = (row < N) & (token < M)
    _finish(total, bias, out, partial, counters, token * N + row, row + token * 0, valid, M * N, parts, SHARED, BIAS)


@triton.jit
def expand_rows(
    out: tl.tensor,
    values: tl.tensor,
    meta: tl.tensor,
    offsets: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    kept: tl.tensor,
    KIND: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    """Write the dense weight, viewed as int64 groups [N, K/4]. Grid: row blocks, super steps."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = rows[:, None]
    lanes = tl.arange(0, GROUPS)[None, :]
    groups = K // 4
    supers = (groups + GROUPS * STEPS - 1) // (GROUPS * STEPS)
    s = tl.program_id(1)
    planes = lanes
    if KIND == NIBBLE:
        planes = tl.load(meta + row * (supers * GROUPS) + s * GROUPS + lanes, mask=row < N, other=0)
    for t in tl.static_range(STEPS):
        group = (s * STEPS + t) * GROUPS + lanes
        valid = (row < N) & (group < groups)
        e0, e1, e2, e3 = entries(values, meta, offsets, planes, row, valid, group, t * 4, N, K, kept, KIND)
        low = (e0 & 0xFFFF).to(tl.int64) | ((e1 & 0xFFFF).to(tl.int64) << 16)
        high = (e2 & 0xFFFF).to(tl.int64) | ((e3 & 0xFFFF).to(tl.int64) << 16)
        tl.store(out + row * groups + group, low | (high << 32), mask=valid)
