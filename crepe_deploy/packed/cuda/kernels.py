"""Triton kernels for packed weights: one streaming skeleton, and the expansion of a whole weight.

    y[m, n] = sum_k x[m, k] W[n, k] + bias[n]

A group is 4 consecutive columns, a step 32 groups, a super step 8 steps; one lane owns one group. Four kinds of weight
share the skeleton and differ in how a lane learns its four entries (`_group`):

    NIBBLE  2:4: the group's two values are one 32-bit word; eight steps' nibbles lie bit-plane by bit-plane in one word
    MASK    any N:M that keeps equally many of every 32 columns: a value's place is the population count of the mask
            below its column, so a lane reads at most four neighbours out of one or two cache lines
    ROWS    the same, with the place where each 32 columns' values start read from `offsets`
    DENSE   the control: an ordinary weight, 8 bytes a group

Few tokens (BM 1, 2 or 4) are multiplied on the ordinary cores, more on the tensor cores, one product for each of a
group's four positions, so that expanded weights need no reordering. Sums are kept in fp32. With `parts` > 1
programs share a row block: each leaves a partial sum and the one that arrives last adds them in order, so the result
does not depend on who that was. `triton` is needed to import this module.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

DENSE = tl.constexpr(0)
NIBBLE = tl.constexpr(1)
MASK = tl.constexpr(2)
ROWS = tl.constexpr(3)
GROUPS = tl.constexpr(32)  # groups of a step
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter has no bf16 products
STEPS = tl.constexpr(8)  # steps of a super step: as many nibbles as a word holds


@triton.jit
def _add(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The sum of a reduction. (`tl.sum`, itself compiled, could not be interpreted beside compiled kernels.)"""
    return a + b


@triton.jit
def _float(bits: tl.tensor, BF16: tl.constexpr) -> tl.tensor:
    """fp32 of the 16-bit numbers in the low halves of int32 `bits`."""
    if BF16:
        number = (bits << 16).to(tl.float32, bitcast=True)
    else:
        number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def _half(bits: tl.tensor, BF16: tl.constexpr) -> tl.tensor:
    """The 16-bit numbers in the low halves of int32 `bits`, as such."""
    if INTERPRETED:
        number = _float(bits, BF16)
    elif BF16:
        number = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        number = bits.to(tl.int16).to(tl.float16, bitcast=True)
    return number


@triton.jit
def _ones(word: tl.tensor) -> tl.tensor:
    """Population count of uint32; in the form that LLVM turns into one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def _pair(
    values: tl.tensor,
    meta: tl.tensor,
    row: tl.tensor,
    valid: tl.tensor,
    group: tl.tensor,
    shift: tl.tensor,
    K: tl.tensor,
) -> tl.tensor:
    """NIBBLE: the group's two values in one int32, and its nibble; 0 outside. Columns past K hold nibble 0."""
    word = tl.load(values + row * (K // 4) + group, mask=valid, other=0)
    return word, (meta >> shift) & 15


@triton.jit
def _gathered(
    values: tl.tensor,
    meta: tl.tensor,
    offsets: tl.tensor,
    row: tl.tensor,
    valid: tl.tensor,
    group: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    kept: tl.tensor,
    KIND: tl.constexpr,
) -> tl.tensor:
    """MASK and ROWS: the four entries of each group as int32 bits, 0 where nothing is kept."""
    # Addresses are clamped rather than loads masked: masks cost more instructions. What is outside has an empty word.
    chunks = K // 32
    place = tl.minimum(row, N - 1) * chunks + tl.minimum(group // 8, chunks - 1)
    word = tl.where(valid, tl.load(meta + place), 0).to(tl.uint32, bitcast=True)
    start = place * kept if KIND == MASK else tl.load(offsets + place)
    lowest = ((group % 8) * 4).to(tl.uint32)
    below = (tl.full([1, 1], 1, tl.uint32) << lowest) - 1
    at = values + (start + _ones(word & below).to(tl.int32)).to(tl.int64)
    nibble = word >> lowest
    # Four neighbours at fixed distances, then a shift by 16 times the rank: cheaper than an address for each column.
    # The last group reads up to four values past the end; `layout.PAD` is there for it.
    low = tl.load(at).to(tl.uint32) | (tl.load(at + 1).to(tl.uint32) << 16)
    high = tl.load(at + 2).to(tl.uint32) | (tl.load(at + 3).to(tl.uint32) << 16)
    window = low.to(tl.uint64) | (high.to(tl.uint64) << 32)
    s1 = (nibble << 4) & 16
    s2 = s1 + ((nibble << 3) & 16)
    s3 = s2 + ((nibble << 2) & 16)
    e0 = tl.where((nibble & 1) != 0, low, 0).to(tl.int32)
    e1 = tl.where((nibble & 2) != 0, (window >> s1.to(tl.uint64)).to(tl.uint32), 0).to(tl.int32)
    e2 = tl.where((nibble & 4) != 0, (window >> s2.to(tl.uint64)).to(tl.uint32), 0).to(tl.int32)
    e3 = tl.where((nibble & 8) != 0, (window >> s3.to(tl.uint64)).to(tl.uint32), 0).to(tl.int32)
    return e0, e1, e2, e3


@triton.jit
def _group(
    values: tl.tensor,
    meta: tl.tensor,
    offsets: tl.tensor,
    planes: tl.tensor,
    row: tl.tensor,
    valid: tl.tensor,
    group: tl.tensor,
    shift: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    kept: tl.tensor,
    KIND: tl.constexpr,
) -> tl.tensor:
    """The four entries of each lane's group, int32 whose low halves are the numbers' bits."""
    if KIND == DENSE:
        quad = tl.load(values + row * (K // 4) + group, mask=valid, other=0)
        e0, e1 = quad.to(tl.int32), (quad >> 16).to(tl.int32)
        e2, e3 = (quad >> 32).to(tl.int32), (quad >> 48).to(tl.int32)
    elif KIND == NIBBLE:
        word, nibble = _pair(values, planes, row, valid, group, shift, K)
        second = word >> 16
        b0, b1, b2, b3 = (nibble & 1) != 0, (nibble & 2) != 0, (nibble & 4) != 0, (nibble & 8) != 0
        e0 = tl.where(b0, word, 0)
        e1 = tl.where(b1, tl.where(b0, second, word), 0)
        e2 = tl.where(b2, tl.where(b3, word, second), 0)
        e3 = tl.where(b3, second, 0)
    else:
        e0, e1, e2, e3 = _gathered(values, meta, offsets, row, valid, group, N, K, kept, KIND)
    return e0, e1, e2, e3


@triton.jit
def _tokens(
    x: tl.tensor, token: tl.constexpr, group: tl.tensor, inside: tl.tensor, K: tl.tensor, BF16: tl.constexpr
) -> tl.tensor:
    """Four fp32 columns of one token for each group, [1, GROUPS]."""
    quad = tl.load(x + token * (K // 4) + group, mask=inside, other=0)
    x0, x1 = _float(quad.to(tl.int32), BF16), _float((quad >> 16).to(tl.int32), BF16)
    x2, x3 = _float((quad >> 32).to(tl.int32), BF16), _float((quad >> 48).to(tl.int32), BF16)
    return x0, x1, x2, x3


@triton.jit
def _selected(sums: tl.tensor, x: tl.tensor, word: tl.tensor, nibble: tl.tensor, token: tl.constexpr, group: tl.tensor, inside: tl.tensor, K: tl.tensor, BF16: tl.constexpr) -> tl.tensor:  # fmt: skip  # noqa: E501
    """Add one token's products of 2:4 pairs: the nibble picks activations, which is cheaper than placing weights."""
    x0, x1, x2, x3 = _tokens(x, token, group, inside, K, BF16)
    first = tl.where((nibble & 1) != 0, x0, tl.where((nibble & 2) != 0, x1, x2))
    second = tl.where((nibble & 8) != 0, x3, tl.where((nibble & 4) != 0, x2, x1))
    return sums + _float(word, BF16) * first + _float(word >> 16, BF16) * second


@triton.jit
def _placed(sums: tl.tensor, x: tl.tensor, e0: tl.tensor, e1: tl.tensor, e2: tl.tensor, e3: tl.tensor, token: tl.constexpr, group: tl.tensor, inside: tl.tensor, K: tl.tensor, BF16: tl.constexpr) -> tl.tensor:  # fmt: skip  # noqa: E501
    """Add one token's products of expanded groups."""
    x0, x1, x2, x3 = _tokens(x, token, group, inside, K, BF16)
    sums += _float(e0, BF16) * x0
    sums += _float(e1, BF16) * x1
    sums += _float(e2, BF16) * x2
    return sums + _float(e3, BF16) * x3


@triton.jit
def _few(sums: tl.tensor, x: tl.tensor, e0: tl.tensor, e1: tl.tensor, e2: tl.tensor, e3: tl.tensor, word: tl.tensor, nibble: tl.tensor, token: tl.constexpr, group: tl.tensor, inside: tl.tensor, K: tl.tensor, NIBBLES: tl.constexpr, BF16: tl.constexpr) -> tl.tensor:  # fmt: skip  # noqa: E501
    """Add the products of one of a few tokens."""
    if NIBBLES:
        sums = _selected(sums, x, word, nibble, token, group, inside, K, BF16)
    else:
        sums = _placed(sums, x, e0, e1, e2, e3, token, group, inside, K, BF16)
    return sums


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
def _finish(total: tl.tensor, bias: tl.tensor, out: tl.tensor, partial: tl.tensor, counters: tl.tensor, place: tl.tensor, rows: tl.tensor, valid: tl.tensor, size: tl.tensor, parts: tl.tensor, SHARED: tl.constexpr, BIAS: tl.constexpr) -> tl.tensor:  # fmt: skip  # noqa: E501
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


@triton.jit(do_not_specialize=["M", "parts"])
def stream_few(x: tl.tensor, values: tl.tensor, meta: tl.tensor, offsets: tl.tensor, bias: tl.tensor, out: tl.tensor, partial: tl.tensor, counters: tl.tensor, M: tl.tensor, N: tl.tensor, K: tl.tensor, kept: tl.tensor, parts: tl.tensor, KIND: tl.constexpr, BF16: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SHARED: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr) -> None:  # fmt: skip  # noqa: E501
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
                word, nibble = _pair(values, planes, row, valid, group, t * 4, K)
            else:
                e0, e1, e2, e3 = _group(values, meta, offsets, planes, row, valid, group, t * 4, N, K, kept, KIND)
            sums0 = _few(sums0, x, e0, e1, e2, e3, word, nibble, 0, group, inside, K, KIND == NIBBLE, BF16)
            if BM > 1:
                more = inside & (lanes * 0 + 1 < M)
                sums1 = _few(sums1, x, e0, e1, e2, e3, word, nibble, 1, group, more, K, KIND == NIBBLE, BF16)
            if BM > 2:
                third, fourth = inside & (lanes * 0 + 2 < M), inside & (lanes * 0 + 3 < M)
                sums2 = _few(sums2, x, e0, e1, e2, e3, word, nibble, 2, group, third, K, KIND == NIBBLE, BF16)
                sums3 = _few(sums3, x, e0, e1, e2, e3, word, nibble, 3, group, fourth, K, KIND == NIBBLE, BF16)
    total = tl.reduce(sums0, 1, _add)[:, None]
    token = tl.full([1, 1], 0, tl.int32)
    if BM > 1:
        token = tl.arange(0, BM)[None, :]
        total = tl.where(token == 0, total, tl.reduce(sums1, 1, _add)[:, None])
    if BM > 2:
        total = tl.where(token == 2, tl.reduce(sums2, 1, _add)[:, None], total)
        total = tl.where(token == 3, tl.reduce(sums3, 1, _add)[:, None], total)
    valid = (row < N) & (token < M)
    _finish(total, bias, out, partial, counters, token * N + row, row + token * 0, valid, M * N, parts, SHARED, BIAS)


@triton.jit(do_not_specialize=["M", "parts"])
def stream_many(x: tl.tensor, values: tl.tensor, meta: tl.tensor, offsets: tl.tensor, bias: tl.tensor, out: tl.tensor, partial: tl.tensor, counters: tl.tensor, M: tl.tensor, N: tl.tensor, K: tl.tensor, kept: tl.tensor, parts: tl.tensor, KIND: tl.constexpr, BF16: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, SHARED: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr) -> None:  # fmt: skip  # noqa: E501
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
            e0, e1, e2, e3 = _group(
                values, meta, offsets, planes, row, (row < N) & inside, group, t * 4, N, K, kept, KIND
            )
            quad = tl.load(x + token * groups + (first + down), mask=below & (token < M), other=0)
            total = tl.dot(_half(e0, BF16), _half(quad.to(tl.int32), BF16), total)
            total = tl.dot(_half(e1, BF16), _half((quad >> 16).to(tl.int32), BF16), total)
            total = tl.dot(_half(e2, BF16), _half((quad >> 32).to(tl.int32), BF16), total)
            total = tl.dot(_half(e3, BF16), _half((quad >> 48).to(tl.int32), BF16), total)
    valid = (row < N) & (token < M)
    _finish(total, bias, out, partial, counters, token * N + row, row + token * 0, valid, M * N, parts, SHARED, BIAS)


@triton.jit
def expand_rows(out: tl.tensor, values: tl.tensor, meta: tl.tensor, offsets: tl.tensor, N: tl.tensor, K: tl.tensor, kept: tl.tensor, KIND: tl.constexpr, BN: tl.constexpr) -> None:  # fmt: skip  # noqa: E501
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
        e0, e1, e2, e3 = _group(values, meta, offsets, planes, row, valid, group, t * 4, N, K, kept, KIND)
        low = (e0 & 0xFFFF).to(tl.int64) | ((e1 & 0xFFFF).to(tl.int64) << 16)
        high = (e2 & 0xFFFF).to(tl.int64) | ((e3 & 0xFFFF).to(tl.int64) << 16)
        tl.store(out + row * groups + group, low | (high << 32), mask=valid)
