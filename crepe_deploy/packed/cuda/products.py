"""Triton: the products of a few tokens with the groups of one step, on the ordinary cores."""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import to_float


@triton.jit
def _tokens(
    x: tl.tensor, token: tl.constexpr, group: tl.tensor, inside: tl.tensor, K: tl.tensor, BF16: tl.constexpr
) -> tl.tensor:
    """Four fp32 columns of one token for each group, [1, GROUPS]."""
    quad = tl.load(x + token * (K // 4) + group, mask=inside, other=0)
    x0, x1 = to_float(quad.to(tl.int32), BF16), to_float((quad >> 16).to(tl.int32), BF16)
    x2, x3 = to_float((quad >> 32).to(tl.int32), BF16), to_float((quad >> 48).to(tl.int32), BF16)
    return x0, x1, x2, x3


@triton.jit
def _selected(
    sums: tl.tensor,
    x: tl.tensor,
    word: tl.tensor,
    nibble: tl.tensor,
    token: tl.constexpr,
    group: tl.tensor,
    inside: tl.tensor,
    K: tl.tensor,
    BF16: tl.constexpr,
) -> tl.tensor:
    """Add one token's products of 2:4 pairs: the nibble picks activations, which is cheaper than placing weights."""
    x0, x1, x2, x3 = _tokens(x, token, group, inside, K, BF16)
    first = tl.where((nibble & 1) != 0, x0, tl.where((nibble & 2) != 0, x1, x2))
    second = tl.where((nibble & 8) != 0, x3, tl.where((nibble & 4) != 0, x2, x1))
    return sums + to_float(word, BF16) * first + to_float(word >> 16, BF16) * second


@triton.jit
def _placed(
    sums: tl.tensor,
    x: tl.tensor,
    e0: tl.tensor,
    e1: tl.tensor,
    e2: tl.tensor,
    e3: tl.tensor,
    token: tl.constexpr,
    group: tl.tensor,
    inside: tl.tensor,
    K: tl.tensor,
    BF16: tl.constexpr,
) -> tl.tensor:
    """Add one token's products of expanded groups."""
    x0, x1, x2, x3 = _tokens(x, token, group, inside, K, BF16)
    sums += to_float(e0, BF16) * x0
    sums += to_float(e1, BF16) * x1
    sums += to_float(e2, BF16) * x2
    return sums + to_float(e3, BF16) * x3


@triton.jit
def add_products(
    sums: tl.tensor,
    x: tl.tensor,
    e0: tl.tensor,
    e1: tl.tensor,
    e2: tl.tensor,
    e3: tl.tensor,
    word: tl.tensor,
    nibble: tl.tensor,
    token: tl.constexpr,
    group: tl.tensor,
    inside: tl.tensor,
    K: tl.tensor,
    NIBBLES: tl.constexpr,
    BF16: tl.constexpr,
) -> tl.tensor:
    """Add the products of one of a few tokens."""
    if NIBBLES:
        sums = _selected(sums, x, word, nibble, token, group, inside, K, BF16)
    else:
        sums = _placed(sums, x, e0, e1, e2, e3, token, group, inside, K, BF16)
    return sums
