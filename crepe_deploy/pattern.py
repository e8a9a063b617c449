"""Sparsity patterns: `N:M` (N kept of every M consecutive input columns) and unstructured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from crepe_deploy.nearest import unknown

from .errors import PatternError

Granularity = Literal["row", "matrix"]
GRANULARITIES: tuple[Granularity, ...] = ("row", "matrix")
MAX_GROUP = 32


@dataclass(frozen=True)
class NM:
    """Keep `n` of every `m` consecutive input columns of each row."""

    n: int
    m: int

    def __post_init__(self) -> None:
        swapped = 1 <= self.m < self.n <= MAX_GROUP
        meant = f"; did you mean {self.m}:{self.n}?" if swapped else ""
        if not 1 <= self.n < self.m <= MAX_GROUP:
            raise PatternError(f"pattern {self} is not usable: N:M keeps N of M with 1 <= N < M <= {MAX_GROUP}{meant}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.n / self.m


@dataclass(frozen=True)
class Unstructured:
    """Zero the fraction `sparsity`, counted within each row or over the whole matrix."""

    sparsity: float
    granularity: Granularity = "row"

    def __post_init__(self) -> None:
        percent = 1 <= self.sparsity < 100
        meant = f"; did you mean {self.sparsity / 100:g}?" if percent else ""
        if not 0 <= self.sparsity < 1:
            raise PatternError(
                f"sparsity {self.sparsity} is not usable: it is the fraction of zeros, 0 <= s < 1{meant}"
            )
        if self.granularity not in GRANULARITIES:
            raise PatternError(unknown("granularity", self.granularity, GRANULARITIES))

    def __str__(self) -> str:
        short = f"{self.sparsity:g}"
        return f"{short if float(short) == self.sparsity else repr(self.sparsity)}/{self.granularity}"


Pattern: TypeAlias = NM | Unstructured


def parse_pattern(text: str, granularity: Granularity = "row") -> Pattern:
    """Read `"2:4"` or `"0.5"`; `granularity` applies to the latter. Raises PatternError."""
    try:
        if ":" in text:
            n, m = (int(part) for part in text.split(":"))
            return NM(n, m)
        return Unstructured(float(text), granularity)
    except ValueError as error:
        raise PatternError(
            f"pattern '{text}' is not understood: write N:M (N kept of M, e.g. 2:4) or a fraction of zeros (e.g. 0.5)"
        ) from error


def zero_count(pattern: Pattern, out_features: int, in_features: int) -> int:
    """How many entries of an (out, in) weight the pattern zeroes, exactly."""
    if isinstance(pattern, NM):
        return out_features * in_features * (pattern.m - pattern.n) // pattern.m
    if pattern.granularity == "row":
        return out_features * fraction_of(in_features, pattern.sparsity)
    return fraction_of(out_features * in_features, pattern.sparsity)


def fraction_of(count: int, sparsity: float) -> int:
    """floor(count * sparsity), safe against 0.7 * 10 = 6.999... for counts up to billions."""
    return math.floor(round(count * sparsity, 6))


def parse_record(text: str) -> Pattern:
    """Read a pattern as `str` writes it: "2:4", "0.5/row", "0.5/matrix". Raises PatternError."""
    fraction, _, where = text.partition("/")
    for granularity in GRANULARITIES:
        if where in ("", granularity):
            return parse_pattern(fraction, granularity)
    raise PatternError(f"granularity '{where}' of pattern '{text}' is unknown; known: {', '.join(GRANULARITIES)}")


def as_pattern(pattern: Pattern | str | float) -> Pattern:
    """A pattern from what a person writes: one, "2:4", "0.5", "0.5/matrix", or 0.5 of zeros. Raises PatternError."""
    if isinstance(pattern, NM | Unstructured):
        return pattern
    return parse_record(pattern) if isinstance(pattern, str) else Unstructured(float(pattern))


def check_divides(pattern: Pattern, name: str, in_features: int) -> None:
    """Raise PatternError naming the tensor unless `in_features` splits into whole groups."""
    if isinstance(pattern, NM) and in_features % pattern.m:
        raise PatternError(
            f"{name}: its {in_features} input columns do not split into groups of {pattern.m}, as pattern {pattern} "
            f"needs; choose another pattern or leave it out with --exclude"
        )
