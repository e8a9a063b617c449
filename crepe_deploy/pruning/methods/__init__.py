"""The pruning methods. Adding one takes a file, a line in `METHODS` and a row in the tests."""

from __future__ import annotations

from typing import Any

from crepe_deploy.errors import ConfigError
from crepe_deploy.nearest import unknown
from crepe_deploy.parameters import build

from .base import ScoreMethod, SolveMethod
from .crepe import Crepe
from .magnitude import Magnitude
from .ria import RIA
from .sparsegpt import SparseGPT
from .wanda import Wanda

METHODS: dict[str, type[Any]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "crepe": Crepe,
    "sparsegpt": SparseGPT,
}


def get_method(name: str, **params: object) -> ScoreMethod | SolveMethod:
    """Build the method `name` with the hyperparameters `params`; the others keep their defaults.

    Raises ConfigError for an unknown method or hyperparameter, listing the known ones, and for a value out of range or
    of another type.
    """
    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    method: ScoreMethod | SolveMethod = build(METHODS[name], params, f"method '{name}'")
    return method
