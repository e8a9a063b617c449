"""CMA-ES with margin over a search space (Hamano et al., GECCO 2022), through the library `cmaes`.

The margin keeps every step of a whole-numbered axis (window, form) reachable, where plain rounding would freeze it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from crepe_deploy.extras import require

from .space import Axis, Setting, Space

POPULATION = 12
SIGMA = 0.25  # of every axis, brought to [0, 1]

Evaluate = Callable[[list[Setting]], list[float]]
Expired = Callable[[], bool]
Report = Callable[[int, Setting, float], None]


@dataclass(frozen=True)
class Ranking:
    """Every evaluated setting once, with its value, lower = better, best first."""

    ranked: list[tuple[Setting, float]]

    @property
    def best(self) -> Setting:
        """The best setting."""
        return self.ranked[0][0]


def never() -> bool:
    """A deadline that does not come."""
    return False


def quiet(asked: int, best: Setting, value: float) -> None:
    """A report that shows nothing."""


def rank(values: dict[str, tuple[Setting, float]]) -> Ranking:
    """Order settings by value, equal values by their key."""
    return Ranking([values[key] for key in sorted(values, key=lambda key: (values[key][1], key))])


def require_cmaes() -> None:
    """Raise MissingExtra unless `cmaes` is installed."""
    require("--optimizer pho", "cmaes")


def cma_es(
    space: Space,
    start: Setting,
    evaluate: Evaluate,
    *,
    evaluations: int,
    seed: int,
    expired: Expired = never,
    report: Report = quiet,
) -> Ranking:
    """Minimise `evaluate` over `space` from the point of `start`, a generation of settings at a time.

    evaluate: the values of a whole generation, which it may compute in parallel; NaN counts as infinitely bad. Stops
    once `evaluations` settings were asked for, or once `expired`, but not before the first generation.
    report: after each generation, the best so far. Raises MissingExtra.
    """
    require_cmaes()
    axes = [axis for axis in space.axes if axis.high > axis.low]
    optimiser = _optimiser(space, axes, start, seed)
    values: dict[str, tuple[Setting, float]] = {}
    asked = 0
    while asked < evaluations and not (asked and expired()):
        points = [optimiser.ask() for _ in range(POPULATION)]
        settings = [space.setting(_from_unit(space, axes, point)) for point, _ in points]
        generation = [math.inf if math.isnan(value) else value for value in evaluate(settings)]
        optimiser.tell([(told, value) for (_, told), value in zip(points, generation, strict=True)])
        values |= {setting.key: (setting, value) for setting, value in zip(settings, generation, strict=True)}
        asked += len(settings)
        report(asked, *rank(values).ranked[0])
        if optimiser.should_stop():
            break
    return rank(values)


def to_unit(value: float, axis: Axis) -> float:
    """Where `value` lies on its axis, brought to [0, 1]; 0 on an axis of one value."""
    return (value - axis.low) / (axis.high - axis.low) if axis.high > axis.low else 0.0


def _optimiser(space: Space, axes: list[Axis], start: Setting, seed: int) -> Any:
    from cmaes import CMAwM

    point = dict(zip((axis.name for axis in space.axes), space.point(start), strict=True))
    return CMAwM(
        mean=np.array([to_unit(point[axis.name], axis) for axis in axes]),
        sigma=SIGMA,
        bounds=np.array([[0.0, 1.0] for _ in axes]),
        steps=np.array([axis.step / (axis.high - axis.low) for axis in axes]),
        seed=seed % (1 << 32),  # what numpy takes
        population_size=POPULATION,
    )


def _from_unit(space: Space, axes: list[Axis], units: Any) -> list[float]:
    """A point of the box; axes of one value, which the optimiser does not know, stand at it."""
    moved = {axis.name: axis.low + float(unit) * (axis.high - axis.low) for axis, unit in zip(axes, units, strict=True)}
    return [moved.get(axis.name, axis.low) for axis in space.axes]
