"""PHO, hybrid: proxies filter, the judge decides.

1. Fit: a Latin hypercube of settings and the anchors are judged. Spearman's correlation of every proxy with the KL to
   the dense model is measured; it fits the sign of proxies that have none and, with --proxy auto, chooses the proxy.
2. Filter: CMA-ES minimises that proxy, which needs no model.
3. Decide: its best settings, spread over the space, are judged. Of everything judged the lowest KL is the result, so
   that it is never worse than an anchor on the search text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .evaluate import Evaluator
from .judge import Verdict
from .optimise import Expired, Found, Report, cma_es, quiet, to_unit
from .proxies import Proxy
from .space import Setting, Space, anchors

SPREAD = 0.1  # finalists are at least this far apart, in units of an axis's length


@dataclass(frozen=True)
class Filter:
    """The proxy that filters, the sign that turns it into damage, and how every proxy ranked what was judged."""

    proxy: str
    sign: int
    spearman: dict[str, float]
    fitted_on: int


@dataclass(frozen=True)
class Outcome:
    """All judged settings and their verdicts, the evaluations of the optimiser, and the filter where one was used."""

    judged: list[tuple[Setting, Verdict]]
    found: Found
    filter: Filter | None


def latin_hypercube(space: Space, count: int, seed: int) -> list[Setting]:
    """`count` settings, each axis cut into `count` slices that are used once each."""
    generator = np.random.default_rng(seed)
    columns = []
    for axis in space.axes:
        units = (generator.permutation(count) + generator.random(count)) / count
        span = axis.high - axis.low + axis.step
        values = axis.low + units * span
        columns.append(np.floor(values) if axis.step else values)
    return [space.setting([float(value) for value in row]) for row in zip(*columns, strict=True)]


def spearman(left: list[float], right: list[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (left, right)]
    centred = [values - values.mean() for values in ranks]
    scale = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale > 0 else 0.0


def correlations(evaluator: Evaluator, judged: list[tuple[Setting, Verdict]]) -> dict[str, float]:
    """Spearman's correlation of every proxy with the KL over judged settings."""
    values = evaluator.proxies([setting for setting, _ in judged])
    kl = [verdict.mean_kl for _, verdict in judged]
    return {name: spearman([each[name] for each in values], kl) for name in values[0]}


def choose_filter(measured: dict[str, float], proxies: dict[str, Proxy], count: int) -> Filter:
    """The proxy of `proxies` that ranks damage best with its own sign, or with the fitted one where it has none."""
    signs = {name: proxy.sign or (1 if measured[name] >= 0 else -1) for name, proxy in proxies.items()}
    best = max(proxies, key=lambda name: signs[name] * measured[name])
    return Filter(best, signs[best], measured, count)


def spread_out(space: Space, found: Found, count: int) -> list[Setting]:
    """The best `count` settings of which none is nearly another; fewer where there are no more."""
    taken: list[tuple[Setting, list[float]]] = []
    for setting, _ in found.ranked:
        units = [to_unit(value, axis) for value, axis in zip(space.point(setting), space.axes, strict=True)]
        if all(math.dist(units, other) >= SPREAD for _, other in taken):
            taken.append((setting, units))
        if len(taken) == count:
            break
    return [setting for setting, _ in taken]


def pho(
    space: Space,
    evaluator: Evaluator,
    proxies: dict[str, Proxy],
    *,
    fit: int,
    finalists: int,
    evaluations: int,
    seed: int,
    expired: Callable[[int], Expired],
    say: Callable[[str], None],
    report: Report = quiet,
) -> Outcome:
    """Run the three steps of the module's docstring.

    expired: given how many settings will still be judged, tells whether the filter must stop to leave time for them.
    """
    known = list(anchors().values())
    first = _distinct([*known, *latin_hypercube(space, fit, seed)])
    judged = list(zip(first, evaluator.verdicts(first, "fitting proxies"), strict=True))
    chosen = choose_filter(correlations(evaluator, judged), proxies, len(judged))
    say(_fitted(chosen))

    def damage(settings: list[Setting]) -> list[float]:
        return [chosen.sign * values[chosen.proxy] for values in evaluator.proxies(settings)]

    best = min((pair for pair in judged if pair[0].method == "crepe"), key=lambda pair: pair[1].mean_kl)[0]
    found = cma_es(space, best, damage, evaluations=evaluations, seed=seed, expired=expired(finalists), report=report)
    new = [setting for setting in spread_out(space, found, finalists) if setting.key not in {s.key for s in first}]
    judged += zip(new, evaluator.verdicts(new, "deciding"), strict=True)
    return Outcome(judged, found, chosen)


def _fitted(chosen: Filter) -> str:
    ranked = ", ".join(f"{name} {value:+.2f}" for name, value in chosen.spearman.items())
    direction = "minimise" if chosen.sign > 0 else "maximise"
    return f"Spearman with KL over {chosen.fitted_on} settings: {ranked}; {direction} {chosen.proxy}"


def _distinct(settings: list[Setting]) -> list[Setting]:
    return list({setting.key: setting for setting in settings}.values())


def _ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    order = np.sort(values)
    low, high = np.searchsorted(order, values, "left"), np.searchsorted(order, values, "right")
    return np.asarray((low + high - 1) / 2)
