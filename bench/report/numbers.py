"""Numbers for people: three significant digits, SI prefixes, intervals in brackets."""

from __future__ import annotations

import math
from typing import Final

from ..run.result import Interval

MISSING: Final = "–"
_PREFIXES: Final = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def digits(value: float, count: int = 3) -> str:
    """A number with `count` significant digits and no exponent between 1e-4 and 1e7."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    rounded = float(f"{value:.{count - 1}e}")
    size = math.floor(math.log10(abs(rounded))) if math.isfinite(rounded) else 308  # the largest floats round up
    if not -5 < size < 7:
        return f"{value:.{count - 1}e}"
    return f"{rounded:.{max(count - 1 - size, 0)}f}"


def si(value: float | None, unit: str, low: float | None = None, high: float | None = None) -> str:
    """A quantity with an SI prefix: 0.0123 s is 12.3 ms; its interval in the same unit. None is a dash."""
    if value is None:
        return MISSING
    scale, prefix = _scale(value, unit)
    text = f"{digits(value / scale)} {prefix}{unit}".strip()
    return text if low is None or high is None else f"{text} [{digits(low / scale)}, {digits(high / scale)}]"


def _scale(value: float, unit: str) -> tuple[float, str]:
    """Seconds and bytes get prefixes, bytes none below one; tokens and bare numbers stay plain."""
    if unit not in {"s", "B"} or value == 0 or not math.isfinite(value):
        return 1.0, ""
    rounded = abs(float(f"{value:.2e}"))
    prefixes = [prefix for prefix in _PREFIXES if unit == "s" or prefix[0] >= 1]
    return next((prefix for prefix in prefixes if rounded >= prefix[0]), prefixes[-1])


def interval(figure: Interval | None, suffix: str = "", count: int = 3) -> str:
    """A figure and its interval, such as "1.55× [1.40, 1.73]"; without one where too few rounds were taken."""
    if figure is None:
        return MISSING
    text = digits(figure.value, count) + suffix
    if figure.low is None or figure.high is None:
        return text
    return f"{text} [{digits(figure.low, count)}, {digits(figure.high, count)}]"


def percent(value: float | None) -> str:
    """A fraction as a percentage with three significant digits."""
    return MISSING if value is None else f"{digits(100 * value)} %"


def count(value: int | float) -> str:
    """A whole number with thousands separated by thin spaces."""
    return f"{round(value):,}".replace(",", "\u202f")


def plural(number: int, noun: str) -> str:
    """`3 rounds`, `1 round`."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def capital(text: str) -> str:
    """The text with its first letter in upper case and the rest as it was."""
    return text[:1].upper() + text[1:]
