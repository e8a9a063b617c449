"""The relative check of a gate: how much slower a candidate is than its baseline, with Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ..run.metrics import common_rounds
from ..run.result import Interval
from ..run.statistics import LogMean, detectable, holm, log_mean, paired_log_mean
from .arms import PRUNED, Cell, Gate, Key
from .budgets import Relative
from .checks import MIN_ROUNDS, BelowNoise, Pair, matching, too_few, unmeasured
from .verdict import Comparison, Row, Status

PAIRED: Final[Comparison] = "paired by round"
RATIOS: Final[Comparison] = "ratios to each run's own control"
UNPAIRED: Final[Comparison] = "unpaired"


@dataclass(frozen=True)
class _Asked:
    """A relative budget at one point of one pair, and what the samples say about it."""

    pair: Pair
    key: Key
    budget: Relative
    comparison: Comparison
    estimate: LogMean
    rounds: int
    measured: float
    noise: float | None
    least: float | None = None

    @property
    def limit(self) -> float:
        """The largest slow-down allowed: the budget, what the absolute floor amounts to, or what can be told (`least`,
        where the budget lies below the noise), whichever is more."""
        higher = self.pair[1].cells[self.key].better == "higher"
        before = self.measured * math.exp(self.estimate.mean if higher else -self.estimate.mean)
        share = self.budget.floor / before
        if higher:
            share = share / (1 - share) if share < 1 else math.inf
        return max(1 + self.budget.max_slowdown, 1 + share if self.budget.floor else 0, 1 + (self.least or -1))


def latencies(
    pairs: Sequence[Pair], budgets: Sequence[Relative], gate: Gate, level: float, *, foreign: bool,
    below_noise: BelowNoise = "invalid",
) -> list[Row]:  # fmt: skip
    """Relative slow-downs. On two machines (`foreign`) only ratios to a control count.

    below_noise: whether a budget that lies below the noise is INVALID, or held to what can be told ("warn"), where it
    can fail and not pass.
    """
    rows: list[Row] = []
    asked: dict[str, _Asked] = {}
    for index, pair in enumerate(pairs):
        for item in _relative(pair, budgets, gate, foreign, below_noise):
            if isinstance(item, Row):
                rows.append(item)
            else:
                asked[f"{index}/{'/'.join(item.key)}"] = item
    p_values = holm({name: one.estimate.p_above(one.limit) for name, one in asked.items()})
    return rows + [_latency(one, p_values[name], level) for name, one in asked.items()]


def _relative(
    pair: Pair, budgets: Sequence[Relative], gate: Gate, foreign: bool, below_noise: BelowNoise
) -> Iterator[Row | _Asked]:
    base, new = pair
    everywhere = dict.fromkeys([*base.cells, *new.cells])
    for budget in budgets:
        if not matching(everywhere, budget):
            yield unmeasured(new, "latency", budget)
    for key in everywhere:
        meant = [budget for budget in budgets if matching([key], budget)]
        if meant:
            yield _ask(pair, key, meant[-1], gate, foreign, below_noise)


def _ask(pair: Pair, key: Key, budget: Relative, gate: Gate, foreign: bool, below_noise: BelowNoise) -> Row | _Asked:
    new = pair[1]

    def refuse(reason: str, noise: float | None = None) -> Row:
        return Row(
            candidate=new.name, check="latency", point=key[0], metric=key[1], status="INVALID", reason=reason,
            limit=1 + budget.max_slowdown, noise=noise,
        )  # fmt: skip

    if missing := [arm.name for arm in pair if key not in arm.cells]:
        side = "baseline" if key not in pair[0].cells else "candidate"
        return refuse(f"the {side} {missing[0]} was not measured there")
    cells = (pair[0].cells[key], new.cells[key])
    comparison = _comparison(pair, cells, gate)
    noise = _noise(pair, key, comparison)
    if foreign and comparison != RATIOS:
        return refuse("the runs come from two machines and have no common control here: measure both on one machine")
    least = None
    if noise is not None and _below_noise(budget.max_slowdown, noise, gate):
        least = _round_up(detectable(noise))
        if below_noise == "invalid":
            return refuse(
                f"{_under(budget, noise)}; the least that makes sense is {least:.2%}, or measure more rounds", noise
            )
    try:
        estimate, rounds = slowdown(*cells, comparison)
    except ValueError as error:
        return refuse(f"no ratio can be taken: {error}")
    measured = math.exp(log_mean(list(cells[1].rounds.values())).mean)
    return _Asked(pair, key, budget, comparison, estimate, rounds, measured, noise, least)


def slowdown(base: Cell, new: Cell, comparison: Comparison) -> tuple[LogMean, int]:
    """How much worse `new` is than `base`, and the fewest rounds of either. Raises ValueError for too few samples."""
    if comparison == PAIRED:
        arms = common_rounds(new.rounds, base.rounds)
        estimate, rounds = paired_log_mean(*arms), len(arms[0])
    elif comparison == RATIOS:
        assert new.control is not None and base.control is not None
        mine, theirs = common_rounds(new.rounds, new.control), common_rounds(base.rounds, base.control)
        estimate, rounds = paired_log_mean(*mine).over(paired_log_mean(*theirs)), min(len(mine[0]), len(theirs[0]))
    else:
        values = [list(cell.rounds.values()) for cell in (new, base)]
        estimate, rounds = log_mean(values[0]).over(log_mean(values[1])), min(map(len, values))
    return (estimate if new.better == "lower" else estimate.inverse()), rounds


def _latency(asked: _Asked, p: float, level: float) -> Row:
    value = asked.estimate.interval(level)
    status: Status = "INCONCLUSIVE"
    if asked.rounds >= MIN_ROUNDS and value.high is not None:
        if value.high <= asked.limit:
            status = "PASS" if asked.least is None else "INCONCLUSIVE"
        elif p <= (1 - level) / 2:
            status = "FAIL"
    if math.isinf(asked.limit):
        reason = f"the floor of {asked.budget.floor:g} is all there is, so nothing can fail"
        status = "INVALID"
    else:
        reason = _latency_reason(asked, value, status)
    base, new = asked.pair
    same_scale = asked.comparison != RATIOS
    return Row(
        candidate=new.name, check="latency", point=asked.key[0], metric=asked.key[1], status=status, reason=reason,
        comparison=asked.comparison, value=value, limit=asked.limit if math.isfinite(asked.limit) else None,
        baseline=math.exp(log_mean(list(base.cells[asked.key].rounds.values())).mean) if same_scale else None,
        measured=asked.measured, rounds=asked.rounds, noise=asked.noise, p=p,
    )  # fmt: skip


def _latency_reason(asked: _Asked, value: Interval, status: Status) -> str:
    change = asked.limit - 1
    budget = f"{change:+.1%} in time allowed" if change >= 0 else f"{-change:.1%} less time demanded"
    if asked.least is not None and asked.noise is not None:
        budget = f"{_under(asked.budget, asked.noise)}, so {budget}, and passing says nothing: measure more rounds"
    elif asked.budget.floor and change > asked.budget.max_slowdown:
        unit = asked.pair[1].cells[asked.key].unit
        budget += f", which is the floor of {asked.budget.floor:g} {unit}"
    if status == "INCONCLUSIVE" and value.low is not None and value.low > asked.limit:
        budget += "; beyond it, but not once corrected for the number of rows"
    return budget + too_few(asked.rounds)


def _comparison(pair: Pair, cells: tuple[Cell, Cell], gate: Gate) -> Comparison:
    if gate == PRUNED or all(arm.paired for arm in pair):
        return PAIRED
    return RATIOS if all(cell.control is not None for cell in cells) else UNPAIRED


def _noise(pair: Pair, key: Key, comparison: Comparison) -> float | None:
    """Half-width of what two equal candidates differ by; a ratio of two runs' ratios has two runs' noise."""
    widths = [arm.noise["/".join(key)] for arm in pair if arm.noise and "/".join(key) in arm.noise]
    if not widths:
        return None
    return math.hypot(widths[0], widths[-1]) if comparison == RATIOS else max(widths)


def _below_noise(budget: float, noise: float, gate: Gate) -> bool:
    """Between commits no change is the rule, so a budget must exceed the noise. A demanded gain, and against dense
    "no slower", are decided by the interval alone."""
    return math.log1p(budget) < noise and (budget > 0 if gate == PRUNED else budget >= 0)


def _under(budget: Relative, noise: float) -> str:
    limit, width = budget.max_slowdown, math.expm1(noise)
    return f"the budget of {limit:.2%} lies below the noise of {width:.2%} between equal candidates"


def _round_up(value: float) -> float:
    return math.ceil(1000 * value) / 1000
