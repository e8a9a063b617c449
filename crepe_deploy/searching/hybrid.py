"""PHO, hybrid: proxies filter, the masked model decides.

1. Fit: a Latin hypercube of settings and the anchors are judged. Spearman's correlation of every proxy with the KL to
   the dense model is measured; it fits the sign of proxies that have none and, with --proxy auto, chooses the filter:
   the proxy that ranks best in the first round, the surface fitted over two of them in the second. The best proxy's
   own optimum may be an extreme that no loss would choose, and the surface is worth nothing where it was not fitted;
   so neither is trusted alone.
2. Filter: CMA-ES minimises what was chosen, which needs no model.
3. Decide: its best settings, spread over the space, are judged. Steps 1 (with all that is judged by then) to 3 are
   done `ROUNDS` times. Of everything judged the lowest KL is the result, so that it is never worse than an anchor on
   the search text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from scipy import stats
from scipy.stats import qmc

from crepe_deploy.progress import Say

from .evaluate import Evaluator
from .losses import Losses
from .optimise import Evaluate, Expired, Ranking, Report, cma_es, quiet, to_unit
from .proxies import PROXIES
from .space import Setting, Space, anchors
from .surrogate import NAME, fit_surface, left_out

ROUNDS = 2
SAMPLER = "scipy.stats.qmc.LatinHypercube"
SPREAD = 0.1  # finalists are at least this far apart, in units of an axis's length


Damage: TypeAlias = Callable[[Mapping[str, float]], float]


@dataclass(frozen=True)
class Filter:
    """What filters, its sign (+1: more is more damage), and how every proxy ranked what had been judged."""

    proxy: str
    sign: int
    spearman: dict[str, float]
    fitted_on: int


@dataclass(frozen=True)
class SearchResult:
    """All judged settings and their losses, how many the optimiser evaluated, and the filter of each round.

    chosen: one of the judged, None for that of the least loss.
    """

    judged: list[tuple[Setting, Losses]]
    evaluations: int
    filters: list[Filter]
    chosen: Setting | None = None


def latin_hypercube(space: Space, count: int, seed: int) -> list[Setting]:
    """`count` settings, each axis cut into `count` slices that are used once each."""
    columns = []
    for axis, units in zip(space.axes, qmc.LatinHypercube(len(space.axes), rng=seed).random(count).T, strict=True):
        values = axis.low + units * (axis.high - axis.low + axis.step)
        columns.append(np.minimum(np.floor(values), axis.high) if axis.step else values)
    return [space.setting([float(value) for value in row]) for row in zip(*columns, strict=True)]


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 where one side is constant."""
    if min(len(set(left)), len(set(right))) < 2:
        return 0.0
    return float(stats.spearmanr(left, right).statistic)


def correlations(evaluator: Evaluator, judged: list[tuple[Setting, Losses]]) -> dict[str, float]:
    """Spearman's correlation with the KL over judged settings: of every proxy, and of the surface's predictions."""
    values = evaluator.proxies([setting for setting, _ in judged])
    kl = [losses.mean_kl for _, losses in judged]
    measured = {name: spearman([row[name] for row in values], kl) for name in PROXIES}
    return {**measured, NAME: spearman(left_out(values, kl), kl)}


def choose_filter(measured: dict[str, float], wanted: str, count: int, number: int = 0) -> Filter:
    """The filter called `wanted`; for "auto" the proxy that ranks damage best by its sign, the surface after round 0.

    A proxy without a sign gets the measured one. Equal ones: the first of the registry.
    """
    signs = {name: proxy.sign or (1 if measured[name] >= 0 else -1) for name, proxy in PROXIES.items()}
    best = max(PROXIES, key=lambda name: signs[name] * measured[name]) if number == 0 else NAME
    name = best if wanted == "auto" else wanted
    return Filter(name, signs.get(name, 1), measured, count)


def spread_out(space: Space, ranking: Ranking, count: int, known: list[Setting]) -> list[Setting]:
    """The best `count` settings of which none is nearly another or one that is `known`; fewer where there are no more.

    Known settings of other methods than CRePE have no place in the space and are passed over.
    """
    taken = [_units(space, setting) for setting in known if setting.method == "crepe"]
    new: list[Setting] = []
    for setting, _ in ranking.ranked:
        units = _units(space, setting)
        if len(new) < count and all(math.dist(units, other) >= SPREAD for other in taken):
            new.append(setting)
            taken.append(units)
    return new


def _units(space: Space, setting: Setting) -> list[float]:
    return [to_unit(value, axis) for value, axis in zip(space.point(setting), space.axes, strict=True)]


def pho(
    space: Space,
    evaluator: Evaluator,
    *,
    proxy: str,
    fit: int,
    finalists: int,
    evaluations: int,
    seed: int,
    expired: Callable[[int], Expired],
    say: Say,
    report: Report = quiet,
) -> SearchResult:
    """Run the steps of the module's docstring; `evaluations` and `finalists` are shared out over the rounds.

    expired: given how many settings will still be judged, tells whether the filter must stop to leave time for them.
    """
    first = _distinct([*anchors().values(), *latin_hypercube(space, fit, seed)])
    judged = list(zip(first, evaluator.losses(first, "fitting proxies"), strict=True))
    filters: list[Filter] = []
    asked = 0
    for number in range(ROUNDS):
        filters.append(choose_filter(correlations(evaluator, judged), proxy, len(judged), number))
        say(_fitted(filters[-1]))
        part, share = evaluations * (number + 1) // ROUNDS - asked, -(-finalists // ROUNDS)
        ranking = cma_es(
            space,
            min((pair for pair in judged if pair[0].method == "crepe"), key=lambda pair: pair[1].mean_kl)[0],
            _evaluation(evaluator, filters[-1], judged),
            evaluations=part,
            seed=seed + number,
            expired=expired(share * (ROUNDS - number)),
            report=report,
        )
        asked += len(ranking.ranked)
        new = spread_out(space, ranking, share, [setting for setting, _ in judged])
        judged += zip(new, evaluator.losses(new, "deciding"), strict=True)
    return SearchResult(judged, asked, filters)


def _evaluation(evaluator: Evaluator, chosen: Filter, judged: list[tuple[Setting, Losses]]) -> Evaluate:
    """What CMA-ES minimises."""
    damage: Damage
    if chosen.proxy == NAME:
        kl = [losses.mean_kl for _, losses in judged]
        damage = fit_surface(evaluator.proxies([setting for setting, _ in judged]), kl)
    else:
        damage = partial(_signed, chosen)
    return lambda settings: [damage(values) for values in evaluator.proxies(settings)]


def _signed(chosen: Filter, values: Mapping[str, float]) -> float:
    return chosen.sign * values[chosen.proxy]


def _fitted(chosen: Filter) -> str:
    ranked = ", ".join(f"{name} {value:+.2f}" for name, value in chosen.spearman.items())
    direction = "minimise" if chosen.sign > 0 else "maximise"
    return f"Spearman with KL over {chosen.fitted_on} settings: {ranked}; {direction} {chosen.proxy}"


def _distinct(settings: list[Setting]) -> list[Setting]:
    return list({setting.key: setting for setting in settings}.values())
