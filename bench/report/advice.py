"""Should I prune, quantise, or both? Answered from a run by rules that the report prints beside the answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, Literal

from ..run.result import Interval
from .compare import Comparison, Entry, Kind
from .numbers import digits, interval, percent

MAX_PERPLEXITY_RATIO: Final = 1.10
SMALLER: Final = 0.95

Fault = Literal["unmeasured", "worse", "no gain"]
Answer = Literal["prune", "quantise", "both", "neither", "undecided"]

_WORDS: Final[dict[Answer, str]] = {
    "prune": "Prune.",
    "quantise": "Quantise.",
    "both": "Prune and quantise.",
    "neither": "Neither: keep the baseline.",
    "undecided": "This run cannot say.",
}
_ANSWERS: Final[dict[Kind, Answer]] = {
    "pruned": "prune",
    "quantised": "quantise",
    "pruned and quantised": "both",
    "dense": "neither",
}


@dataclass(frozen=True)
class Advice:
    """The answer in a word, as a headline, with its reasons and the rules that led to it."""

    answer: Answer
    headline: str
    reasons: tuple[str, ...]
    rules: tuple[str, ...]
    chosen: str | None = None


@dataclass(frozen=True)
class Appraisal:
    """A candidate under the rules: which one it fails, if any, and its cost (the lower, the better)."""

    entry: Entry
    speed: Interval | None
    perplexity: Interval | None
    out: Fault | None
    cost: float


def advise(comparison: Comparison, limit: float = MAX_PERPLEXITY_RATIO) -> Advice:
    """Apply the rules to every candidate; the answer is the kind of the cheapest that stays."""
    rules = _rules(comparison, limit)
    appraisals = [_appraise(entry, comparison, limit) for entry in comparison.others if entry.kind != "dense"]
    if not appraisals:
        reason = "No candidate here is pruned or quantised, so there is nothing to choose from."
        return Advice("undecided", _WORDS["undecided"], (reason,), rules)
    staying = sorted((appraisal for appraisal in appraisals if appraisal.out is None), key=attrgetter("cost"))
    reasons = [_praise(staying[0], comparison)] if staying else []
    reasons += [_compare_kinds(staying[0], appraisal) for appraisal in _best_of_other_kinds(staying)]
    reasons += _outs(appraisals, limit)
    reasons += _unmeasured(appraisals)
    answer: Answer
    if staying:
        answer = _ANSWERS[staying[0].entry.kind]
    else:
        answer = "undecided" if all(appraisal.perplexity is None for appraisal in appraisals) else "neither"
    chosen = staying[0].entry.name if staying else None
    return Advice(answer, _WORDS[answer], tuple(reasons), rules, chosen)


def _appraise(entry: Entry, comparison: Comparison, limit: float) -> Appraisal:
    speed = _speed(entry, comparison)
    perplexity = entry.perplexity_ratio()
    smaller = entry.weights is not None and entry.weights <= SMALLER
    point = comparison.headline
    floor = 1.0 if point is None else math.exp(comparison.noise(point.name, "decode_tokens_per_s"))
    faster = speed is not None and speed.low is not None and speed.low > floor
    out: Fault | None = None
    if perplexity is None:
        out = "unmeasured"
    elif _upper(perplexity) > limit:
        out = "worse"
    elif not smaller and not faster:
        out = "no gain"
    time = 1.0 if speed is None else 1 / speed.value
    return Appraisal(entry, speed, perplexity, out, math.sqrt((entry.weights or 1.0) * time))


def _speed(entry: Entry, comparison: Comparison) -> Interval | None:
    point = comparison.headline
    return None if point is None else entry.ratio(point.name, "decode_tokens_per_s")


def _upper(ratio: Interval) -> float:
    return ratio.value if ratio.high is None else ratio.high


def _name(appraisal: Appraisal) -> str:
    return f"“{appraisal.entry.name}” ({appraisal.entry.kind})"


def _praise(appraisal: Appraisal, comparison: Comparison) -> str:
    weights = "unknown bytes" if appraisal.entry.weights is None else f"{percent(appraisal.entry.weights)} of its bytes"
    text = f"{_name(appraisal)} keeps perplexity at {interval(appraisal.perplexity, '×')} the baseline's with {weights}"
    if appraisal.speed is not None and comparison.headline is not None:
        text += f" and decodes at {interval(appraisal.speed, '×')} its speed ({comparison.headline.name})"
    if not appraisal.entry.same_engine:
        text += f"; it ran in {appraisal.entry.candidate.engine}, so part of that is the engine's doing"
    return text + "."


def _compare_kinds(best: Appraisal, other: Appraisal) -> str:
    return f"{_name(other)} also qualifies, at {digits(other.cost / best.cost)}× the cost that the rules count."


def _outs(appraisals: list[Appraisal], limit: float) -> list[str]:
    """One sentence for each rule that put candidates out, naming them."""
    reasons: dict[Fault, str] = {
        "worse": f"Over the perplexity limit of {digits(limit)}×",
        "no gain": "Neither smaller nor clearly faster",
        "unmeasured": "Left out, for their quality against the baseline was not measured",
    }
    said = []
    for fault, reason in reasons.items():
        names = [
            _name(appraisal) + (f" at {interval(appraisal.perplexity, '×')}" if fault == "worse" else "")
            for appraisal in appraisals
            if appraisal.out == fault
        ]
        said += [f"{reason}: {'; '.join(names)}."] if names else []
    return said


def _best_of_other_kinds(staying: list[Appraisal]) -> list[Appraisal]:
    seen = {staying[0].entry.kind} if staying else set()
    best = []
    for appraisal in staying:
        if appraisal.entry.kind not in seen:
            seen.add(appraisal.entry.kind)
            best.append(appraisal)
    return best


def _unmeasured(appraisals: list[Appraisal]) -> list[str]:
    kinds: tuple[Kind, ...] = ("pruned", "quantised", "pruned and quantised")
    missing = [kind for kind in kinds if all(appraisal.entry.kind != kind for appraisal in appraisals)]
    return [f"Not measured here, so not ruled out: a {kind} candidate." for kind in missing]


def _rules(comparison: Comparison, limit: float) -> tuple[str, ...]:
    point = "no point" if comparison.headline is None else f"“{comparison.headline.name}”"
    return (
        f"Quality: the upper end of the perplexity ratio to the baseline is at most {digits(limit)}× "
        "(--max-perplexity-ratio).",
        f"Gain: weight files of at most {percent(SMALLER)} of the baseline's bytes, or a decode speed ratio at {point} "
        "whose whole interval lies above 1 and above the noise floor, where one was measured.",
        "Choice: of those that pass both, the lowest cost, which is the geometric mean of the weight-byte ratio and "
        "the time-per-token ratio (1 where unknown). Its kind is the answer.",
        "A candidate counts as pruned where a method, a pattern or counted zeros say so, as quantised where its format "
        "or precision is named as 8 bits or fewer.",
    )
