"""How large numbers may be that a person gives, wherever they come in. Imports nothing heavy."""

from __future__ import annotations

from typing import Final

from .errors import ConfigError

MOST_SEED: Final = 2**64 - 1
MOST: Final = 2**31 - 1  # of counts: what a C int holds
MOST_WHOLE: Final = 2**53  # of other whole numbers: what a float holds exactly


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed that some generator would refuse."""
    if type(seed) is not int or not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"seed {seed!r:.60} is not from 0 to {MOST_SEED}")
