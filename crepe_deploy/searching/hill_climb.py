"""Hill climbing by coordinate steps: the slow baseline that the paper compares PHO with.

One axis after the other a step up and a step down are tried and the better one is taken if it improves. A round without
any improvement halves the steps of the continuous axes; the search ends when that has happened `HALVINGS` times more.
"""

from __future__ import annotations

from .optimise import Evaluate, Expired, Ranking, Report, never, quiet, rank
from .space import Axis, Setting, Space

STEPS = {"log_beta": 1.0, "log_gamma": 2.0, "exponent": 0.25}
HALVINGS = 2


class _Climb:
    """The state of one climb: where it stands, and everything evaluated so far."""

    def __init__(self, space: Space, start: Setting, evaluate: Evaluate) -> None:
        self.space, self.evaluate = space, evaluate
        self.values: dict[str, tuple[Setting, float]] = {}
        self.point = space.point(start)
        self.best = start
        self.value = self._values([start])[0]

    def _values(self, settings: list[Setting]) -> list[float]:
        new = list({setting.key: setting for setting in settings if setting.key not in self.values}.values())
        if new:
            pairs = zip(new, self.evaluate(new), strict=True)
            self.values |= {setting.key: (setting, value) for setting, value in pairs}
        return [self.values[setting.key][1] for setting in settings]

    def try_axis(self, index: int, axis: Axis, scale: float) -> bool:
        """Take the better of a step up and a step down if it improves; whether it did."""
        step = axis.step or STEPS[axis.name] * scale
        points = []
        for moved in (self.point[index] + step, self.point[index] - step):
            clipped = min(max(moved, axis.low), axis.high)
            if clipped != self.point[index]:
                points.append([*self.point[:index], clipped, *self.point[index + 1 :]])
        settings = [self.space.setting(point) for point in points]
        tried = zip(self._values(settings), points, settings, strict=True)
        value, point, setting = min(
            tried, key=lambda candidate: candidate[0], default=(self.value, self.point, self.best)
        )
        improved = value < self.value
        if improved:
            self.point, self.best, self.value = point, setting, value
        return improved


def hill_climb(
    space: Space,
    start: Setting,
    evaluate: Evaluate,
    *,
    evaluations: int,
    expired: Expired = never,
    report: Report = quiet,
) -> Ranking:
    """Minimise `evaluate` over `space` from `start` by coordinate steps.

    Stops once `evaluations` different settings were evaluated (the last step may exceed it by one), once `expired`,
    or when no step improves any more. report: after each axis, the best so far.
    """
    climb = _Climb(space, start, evaluate)
    scale, improved = 1.0, True
    while improved or scale > 0.5**HALVINGS:
        if not improved:
            scale /= 2
        improved = False
        for index, axis in enumerate(space.axes):
            if len(climb.values) >= evaluations or expired():
                return rank(climb.values)
            improved |= climb.try_axis(index, axis, scale)
            report(len(climb.values), climb.best, climb.value)
    return rank(climb.values)
