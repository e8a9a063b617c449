"""What decides which experts go."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crepe_deploy.errors import ConfigError
from crepe_deploy.nearest import unknown

from .methods import METHODS


@dataclass(frozen=True)
class ExpertsConfig:
    """remove: the share of each layer's experts below 1, or their number. dtype: to measure in."""

    remove: float
    method: str
    seed: int = 0
    dtype: str = "auto"

    def check(self) -> None:
        """Raise ConfigError for what no model can be given."""
        if self.method not in METHODS:
            raise ConfigError(unknown("method", self.method, list(METHODS)))
        if not (math.isfinite(self.remove) and self.remove > 0):
            raise ConfigError(f"--remove {self.remove}: a share between 0 and 1, or a number of experts of each layer")
