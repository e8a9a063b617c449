"""How large numbers may be that a person gives, wherever they come in. Imports nothing heavy."""

from __future__ import annotations

from typing import Final

from .errors import ConfigError

MOST_SEED: Final = 2**64 - 1
MOST: Final = 2**31 - 1  # of counts: what a C int holds


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed that some generator would refuse."""
    if type(seed) is not int or not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"seed {seed!r:.60} is not from 0 to {MOST_SEED}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ConfigError for a count that is none; name: what it counts."""
    if type(value) is not int or not least <= value <= MOST:
        raise ConfigError(f"{name} is {value!r:.60}; it must be a whole number from {least} to {MOST}")
