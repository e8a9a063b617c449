"""Triton: how a lane learns the four entries of its group, for each kind of weight.

A group is 4 consecutive columns, a step 32 groups, a super step 8 steps; one lane owns one group. The kinds:

    NIBBLE  2:4: the group's two values are one 32-bit word; eight steps' nibbles lie bit-plane by bit-plane in one word
    MASK    any N:M that keeps equally many of every 32 columns: a value's place is the population count of the mask
            below its column, so a lane reads at most four neighbours out of one or two cache lines
    ROWS    the same, with the place where each 32 columns' values start read from `offsets`
    DENSE   the control: an ordinary weight, 8 bytes a group
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
def to_float(bits: tl.tensor, BF16: tl.constexpr) -> tl.tensor:
    """fp32 of the 16-bit numbers in the low halves of int32 `bits`."""
    if BF16:
        number = (bits << 16).to(tl.float32, bitcast=True)
    else:
        number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def to_half(bits: tl.tensor, BF16: tl.constexpr) -> tl.tensor:
    """The 16-bit numbers in the low halves of int32 `bits`, as such."""
    if INTERPRETED:
        number = to_float(bits, BF16)
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
def pair(
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
def entries(
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
        word, nibble = pair(values, planes, row, valid, group, shift, K)
        second = word >> 16
        b0, b1, b2, b3 = (nibble & 1) != 0, (nibble & 2) != 0, (nibble & 4) != 0, (nibble & 8) != 0
        e0 = tl.where(b0, word, 0)
        e1 = tl.where(b1, tl.where(b0, second, word), 0)
        e2 = tl.where(b2, tl.where(b3, word, second), 0)
        e3 = tl.where(b3, second, 0)
    else:
        e0, e1, e2, e3 = _gathered(values, meta, offsets, row, valid, group, N, K, kept, KIND)
    return e0, e1, e2, e3
