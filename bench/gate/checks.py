"""The checks that a verdict is made of: each takes pairs of arms and budgets, and returns rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

from ..run.result import Interval
from ..run.statistics import log_mean, pooled_quantile
from .arms import PRUNED, Arm, Gate, Key
from .budgets import Budgets, Objective, Relative
from .verdict import Check, Row, Status

HostMismatch = Literal["refuse", "ratios"]
BelowNoise = Literal["invalid", "warn"]
Pair = tuple[Arm, Arm]  # baseline, candidate

MIN_ROUNDS: Final = 5


def comparable(pair: Pair, host_mismatch: HostMismatch) -> list[Row]:
    """Why two arms cannot be compared; no rows where they can."""
    name = pair[1].name
    failures = dict.fromkeys(failure for arm in pair for failure in arm.failures)
    rows = [
        Row(candidate=name, check=check, point=point, metric=check, status="INVALID", reason=reason)
        for check, point, reason in failures
    ]
    hints: dict[Check, str] = {
        "host": "; compare on one machine, or only ratios within each run with --host-mismatch ratios",
        "workload": "; measure both with the same scenario",
        "model": "; compare the same model in both",
    }
    for check, hint in hints.items():
        differing = [] if check == "host" and host_mismatch == "ratios" else differences(pair, check)
        if differing:
            reason = f"{check} differs: {'; '.join(differing)}{hint}"
            rows.append(Row(candidate=name, check=check, metric=check, status="INVALID", reason=reason))
    return rows


def differences(pair: Pair, topic: str) -> list[str]:
    """Facts of a topic on which two arms disagree, in words."""
    base, new = (arm.facts.get(topic, {}) for arm in pair)
    return [
        f"{name} {_short(base.get(name))} against {_short(new.get(name))}"
        for name in sorted(base.keys() | new.keys())
        if base.get(name) != new.get(name)
    ]


def nothing_left(pair: Pair) -> Row:
    """The row of a gate whose every budget had to be skipped."""
    reason = "no budget is left to judge: absolute objectives hold on one machine only"
    return Row(candidate=pair[1].name, check="host", metric="host", status="INVALID", reason=reason)


def objectives(pairs: Sequence[Pair], budgets: Budgets, level: float) -> list[Row]:
    """Absolute service objectives, of the candidates alone."""
    asked = []
    rows = []
    for _, new in pairs:
        for objective in budgets.objectives:
            keys = matching(new.cells if objective.max is None else new.requests, objective)
            asked += [(new, objective, key) for key in keys]
            if not keys:
                rows.append(unmeasured(new, "objective", objective))
    corrected = 1 - (1 - level) / max(len(asked), 1)  # Bonferroni: these have intervals, and no p-values for Holm
    return rows + [_objective(*one, level, corrected) for one in asked]


def _objective(arm: Arm, objective: Objective, key: Key, level: float, corrected: float) -> Row:
    if objective.max is not None:
        rounds, limit, sign = len(arm.requests[key]), objective.max, 1
        wide, wider = (pooled_quantile(arm.requests[key], objective.quantile, share) for share in (level, corrected))
        name = f"{key[1]} p{100 * objective.quantile:g}"
    else:
        assert objective.min is not None
        rounds, limit, sign = len(arm.cells[key].rounds), objective.min, -1
        estimate = log_mean(list(arm.cells[key].rounds.values()))
        wide, wider = estimate.interval(level), estimate.interval(corrected)
        name = key[1]
    status = _decide(wide, wider, limit, sign, rounds)
    reason = f"{'at most' if sign > 0 else 'at least'} {limit:g} asked" + too_few(rounds)
    unit = arm.cells[key].unit
    return Row(
        candidate=arm.name, check="objective", point=key[0], metric=name, status=status, reason=reason, value=wide,
        limit=limit, unit=unit, rounds=rounds, measured=wide.value,
    )  # fmt: skip


def _decide(wide: Interval, wider: Interval, limit: float, sign: int, rounds: int) -> Status:
    """PASS by the plain interval, FAIL by the corrected one; sign -1 where higher is better."""
    if rounds < MIN_ROUNDS or wide.low is None or wide.high is None or wider.low is None or wider.high is None:
        return "INCONCLUSIVE"
    if (wide.high if sign > 0 else -wide.low) <= sign * limit:
        return "PASS"
    return "FAIL" if (wider.low if sign > 0 else -wider.high) > sign * limit else "INCONCLUSIVE"


def memories(pairs: Sequence[Pair], budgets: Budgets, *, foreign: bool) -> list[Row]:
    """Growth of memory: one figure a run, so without an interval; on two machines relative to each run's control."""
    return [_memory(pair, name, growth, foreign) for pair in pairs for name, growth in budgets.memory.items()]


def _memory(pair: Pair, name: str, growth: float, foreign: bool) -> Row:
    base, new = (_memory_figure(arm, name, foreign) for arm in pair)
    row = Row(candidate=pair[1].name, check="memory", metric=f"{name}_bytes", status="INVALID", reason="")
    if not base or new is None:
        reason = f"{pair[0].name if not base else pair[1].name} has no {name}_bytes"
        return row.model_copy(update={"reason": reason + (" beside a control" if foreign else "")})
    ratio = new / base
    return row.model_copy(
        update={
            "status": "PASS" if ratio <= 1 + growth else "FAIL",
            "reason": f"{growth:+.1%} allowed",
            "value": Interval(value=ratio),
            "limit": 1 + growth,
            "baseline": None if foreign else base,
            "measured": None if foreign else new,
        }
    )


def _memory_figure(arm: Arm, name: str, foreign: bool) -> float | None:
    figure = arm.memory.get(name)
    if not foreign or figure is None:
        return figure
    control = (arm.control_memory or {}).get(name)
    return figure / control if control else None


def qualities(pairs: Sequence[Pair], budgets: Budgets, gate: Gate) -> list[Row]:
    """Perplexity against the baseline arm; KL divergence and equal top tokens against the run's own baseline."""
    asked = budgets.quality.model_dump(exclude_none=True)
    return [_quality(pair, name, limit, gate) for pair in pairs for name, limit in asked.items()]


def _quality(pair: Pair, name: str, limit: float, gate: Gate) -> Row:
    base, new = (arm.quality for arm in pair)
    row = Row(candidate=pair[1].name, check="quality", metric=name, status="INVALID", reason="", limit=limit)
    if new is None or (gate != PRUNED and base is None):
        return row.model_copy(update={"reason": "there is a budget for it, and quality was not measured"})
    if base is not None and _decisive(base.convention) != _decisive(new.convention):
        return row.model_copy(update={"reason": "the two were measured with different conventions"})
    if gate != PRUNED and base is not None and name == "perplexity_ratio":
        value, what = Interval(value=new.perplexity.value / base.perplexity.value), "on the same text"
    else:
        figure: Interval | None = getattr(new, name)
        if figure is None:
            return row.model_copy(update={"reason": f"there is a budget for it, and {name} was not measured"})
        value, what = figure, "against the run's baseline"
    sign = -1 if name == "same_top" else 1
    status = _within(value, limit, sign)
    reason = f"{'at most' if sign > 0 else 'at least'} {limit:g} allowed {what}"
    if status == "INCONCLUSIVE":
        reason += "; more evaluation text can decide, more rounds cannot"
    unit = {"perplexity_ratio": "ratio", "same_top": "share"}.get(name, "nats")
    return row.model_copy(update={"status": status, "value": value, "reason": reason, "unit": unit})


def _decisive(convention: Mapping[str, Any]) -> dict[str, Any]:
    """What a figure depends on: not how long the text is behind the tokens that were scored."""
    return {name: value for name, value in convention.items() if name != "text_tokens"}


def _within(value: Interval, limit: float, sign: int) -> Status:
    """By the interval where there is one; the same text scored twice has none, and needs none."""
    low, high = (value.value if end is None else end for end in (value.low, value.high))
    worst, best = (high, low) if sign > 0 else (-low, -high)
    return "PASS" if worst <= sign * limit else "FAIL" if best > sign * limit else "INCONCLUSIVE"


def matching(keys: Mapping[Key, Any] | Sequence[Key], budget: Relative | Objective) -> list[Key]:
    """The places that a budget is meant for."""
    return [key for key in keys if key[1] == budget.metric and fnmatchcase(key[0], budget.points)]


def unmeasured(arm: Arm, check: Check, budget: Relative | Objective) -> Row:
    """The row of a budget for what was not measured anywhere: a gate never skips one in silence."""
    reason = f"there is a budget for it, and no sample at any point that '{budget.points}' matches"
    return Row(candidate=arm.name, check=check, metric=budget.metric, status="INVALID", reason=reason)


def too_few(rounds: int) -> str:
    """What to add to a reason where there are too few rounds."""
    return "" if rounds >= MIN_ROUNDS else f"; {rounds} rounds, at least {MIN_ROUNDS} are needed"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
