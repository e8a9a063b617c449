"""What is searched, as data: CRePE's coefficients, exponent, window and neighbourhood form, and the fixed anchors.

alpha is 1, for a ranking does not see a common factor. The first two axes are logarithms whose lower end means exactly
0, so that RIA (gamma = 0) and, inside rows and groups, Wanda (beta = gamma = 0, exponent 1: a row's own sum does not
change its ranking) are points of the space and not limits of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from crepe_deploy.errors import ConfigError
from crepe_deploy.pruning.methods import get_method
from crepe_deploy.pruning.methods.base import ScoreMethod, SolveMethod
from crepe_deploy.pruning.methods.crepe import Crepe
from crepe_deploy.pruning.methods.neighbourhoods import Window
from crepe_deploy.pruning.recipe import load_preset

FORMS: tuple[str, ...] = get_args(Window)
KERNEL_SIZES = (3, 5, 7, 9, 11, 15, 31)
LOG_BETA_ZERO, LOG_GAMMA_ZERO = -3.0, -6.0  # below these the coefficient is exactly 0
DIGITS = 4  # of a coefficient: finer steps change no mask that could be told apart


@dataclass(frozen=True)
class Axis:
    """One coordinate: its bounds, and its step, 0 where it is continuous."""

    name: str
    low: float
    high: float
    step: float


@dataclass(frozen=True)
class Setting:
    """A method and all its hyperparameters: one point that can be scored, judged and written as a preset.

    kinds: by kind of layer, hyperparameters that go before `params` there.
    """

    method: str
    params: dict[str, Any]
    kinds: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """One text for equal settings, the journal's name for them."""
        own = {"kinds": self.kinds} if self.kinds else {}
        return json.dumps({"method": self.method, **self.params, **own}, sort_keys=True)

    def build(self, kind: str | None = None) -> ScoreMethod | SolveMethod:
        """The method itself, for layers of a kind or for all others. Raises ConfigError for values out of range."""
        return get_method(self.method, **{**self.params, **self.kinds.get(kind or "", {})})


@dataclass(frozen=True)
class Space:
    """The searched box. `kernel_sizes` ascending and odd, at most `widest` wide. Raises ConfigError."""

    kernel_sizes: tuple[int, ...] = KERNEL_SIZES
    widest: int = field(default=10**9)

    def __post_init__(self) -> None:
        sizes = self.kernel_sizes
        if not sizes or list(sizes) != sorted(set(sizes)):
            raise ConfigError(f"kernel sizes {list(sizes)} must ascend and name at least one")
        for size in sizes:
            Crepe(kernel_size=size)
        if sizes[-1] > self.widest:
            raise ConfigError(
                f"kernel size {sizes[-1]} exceeds {self.widest}, the shortest side of a matrix to be pruned: "
                f"give --kernels without it"
            )

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The coordinates, in order."""
        return (
            Axis("log_beta", LOG_BETA_ZERO - 0.5, 3.0, 0),
            Axis("log_gamma", LOG_GAMMA_ZERO - 1.0, 2.0, 0),
            Axis("exponent", 0.0, 1.5, 0),
            Axis("kernel_size", 0, len(self.kernel_sizes) - 1, 1),
            Axis("neighbourhood", 0, len(FORMS) - 1, 1),
        )

    def setting(self, point: Sequence[float]) -> Setting:
        """The setting at a point of the box. Without a neighbourhood its window and form are the defaults."""
        log_beta, log_gamma, exponent, size, form = point
        beta = 0.0 if log_beta < LOG_BETA_ZERO else _rounded(math.exp(log_beta))
        params: dict[str, Any] = {"alpha": 1.0, "beta": beta, "gamma": 0.0, "exponent": _rounded(exponent)}
        params |= {"kernel_size": Crepe.kernel_size, "neighbourhood": Crepe.neighbourhood}
        if log_gamma >= LOG_GAMMA_ZERO:
            params |= {"gamma": _rounded(math.exp(log_gamma)), "kernel_size": self.kernel_sizes[round(size)]}
            params["neighbourhood"] = FORMS[round(form)]
        return Setting("crepe", params)

    def point(self, setting: Setting) -> list[float]:
        """The nearest point of the box to a CRePE setting, where an optimiser can start."""
        crepe = Crepe(**setting.params)
        size = min(range(len(self.kernel_sizes)), key=lambda index: abs(self.kernel_sizes[index] - crepe.kernel_size))
        wanted = [
            _log(crepe.beta / crepe.alpha if crepe.alpha else math.inf),
            _log(crepe.gamma / crepe.alpha if crepe.alpha else math.inf),
            crepe.exponent,
            size,
            FORMS.index(crepe.neighbourhood),
        ]
        return [min(max(value, axis.low), axis.high) for value, axis in zip(wanted, self.axes, strict=True)]


def anchors() -> dict[str, Setting]:
    """The settings that a search must not lose to, by name: RIA with two exponents, Wanda, the shipped preset."""
    ria = {"alpha": 1.0, "beta": 1.0, "gamma": 0.0, "kernel_size": 7, "neighbourhood": "smooth"}
    shipped = load_preset("default")
    return {
        "RIA, a = 0.5": Setting("crepe", {**ria, "exponent": 0.5}),
        "RIA, a = 1": Setting("crepe", {**ria, "exponent": 1.0}),
        "Wanda": Setting("wanda", {}),
        "preset default": Setting(shipped.method, dict(shipped.params)),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
