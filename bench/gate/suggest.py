"""Budgets from a run's own noise, as YAML whose comments say where each number comes from.

What could be told only beyond `MOST` becomes a comment instead of a budget: it would catch next to nothing.
"""

from __future__ import annotations

import glob
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from ...errors import ConfigError
from ...store.reading import parse_yaml
from ..run.metrics import METRICS, common_rounds, rounds_of
from ..run.result import Candidate, Run
from ..run.statistics import LogMean, detectable, half_width, log_mean, paired_log_mean, positive
from .arms import COMMITS, PRUNED, Gate, Key
from .budgets import MEMORY_NAMES, Budgets, MemoryName
from .checks import MIN_ROUNDS

GATED: Final = ("tpot_s", "ttft_s")
MOST: Final = 0.5  # of a slow-down that must be exceeded before it is noticed
LEAST_MEMORY: Final = 0.02  # memory is one figure a run
SAME_TEXT: Final = 1.005


@dataclass(frozen=True)
class Suggested:
    """A budgets file. warnings: what was measured and cannot be held to anything."""

    gate: Gate
    content: dict[str, Any]
    lines: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def text(self) -> str:
        """The file, comments included."""
        return "\n".join(self.lines) + "\n"


@dataclass
class _Draft:
    lines: list[str]
    warnings: list[str] = field(default_factory=list)

    def warn(self, text: str, indent: str = "") -> None:
        self.warnings.append(text)
        self.lines.append(f"{indent}# WARNING: {text}")


def suggest(run: Run, place: str, pruned: str | None = None) -> Suggested:
    """Budgets for this commit against the last, or with a candidate's name for that one against the run's baseline.

    place: how the run is named on the command line. Raises ConfigError for a run that has fewer than two rounds, or a
    name that is not in it.
    """
    if pruned == run.baseline:
        raise ConfigError(f"name a candidate other than the run's baseline '{run.baseline}'")
    gated = _gated(run) if pruned is None else [run.candidate(pruned)]
    draft = _Draft(_head(run, place, pruned))
    rounds = min(len({visit.round for visit in series.visits}) for one in gated for series in one.series)
    if rounds < 2:
        raise ConfigError(f"{place} has {rounds} rounds, and noise is what rounds differ by: measure at least two")
    if rounds < MIN_ROUNDS:
        draft.warn(f"{rounds} rounds: a gate decides nothing with fewer than {MIN_ROUNDS}")
    draft.lines.append("relative:")
    before = len(draft.lines)
    for key in _keys(run):
        _relative(draft, run, key, gated, pruned)
    if not any(line.lstrip().startswith("-") for line in draft.lines[before:]):
        draft.lines[before - 1] = "relative: []"
    draft.lines += [*_memory(run, gated, pruned), *_quality(gated, pruned)]
    content = parse_yaml("\n".join(draft.lines), place, ConfigError)
    Budgets.model_validate(content)
    return Suggested(PRUNED if pruned else COMMITS, content, tuple(draft.lines), tuple(draft.warnings))


def _gated(run: Run) -> list[Candidate]:
    usual = [one for one in run.candidates if one.name != run.baseline and "aa_of" not in one.notes]
    return usual or [run.candidate(run.baseline)]


def _head(run: Run, place: str, pruned: str | None) -> list[str]:
    host = run.environment.host
    engines = ", ".join(sorted({one.engine for one in run.candidates}))
    if pruned is None:
        gate, against = "This commit against the last", "crepe-deploy gate BASE.json NEW.json --budgets FILE"
        meaning = "Each max_slowdown is the least that an unchanged commit passes four times of five at this noise;"
    else:
        name = shlex.quote(pruned)
        gate, against = f"{pruned} against dense", f"crepe-deploy gate RUN.json --pruned {name} --budgets FILE"
        meaning = "Each limit is what was measured and what the same model passes four times of five at this noise;"
    comments = [
        f"{gate}: {against}",
        f"Suggested by `crepe-deploy gate --suggest-budgets` from the noise of {place}: '{run.name}', {run.created}",
        f"{engines} on {host.cpu}, {host.cores} cores, {run.environment.threads} threads",
        meaning,
        "one that is worse is caught as often once it is beyond by as much again. More rounds make limits smaller.",
    ]
    return [f"# {_line(text)}" for text in comments]


def _keys(run: Run) -> Iterator[Key]:
    """What the baseline has samples of, in order."""
    for metric in GATED:
        for series in run.candidate(run.baseline).series:
            if rounds_of(series, METRICS[metric]):
                yield series.point, metric


def _relative(draft: _Draft, run: Run, key: Key, gated: Sequence[Candidate], pruned: str | None) -> None:
    """One line: a budget and why, or a warning."""
    estimates = [estimate for one in gated if (estimate := _over_baseline(run, one, key)) is not None]
    if not estimates:
        draft.warn(f"{key[1]} at '{_line(key[0])}': too few common rounds, not gated", "  ")
        return
    twins = (run.noise or {}).get("/".join(key))
    own = max(half_width(estimate) for estimate in estimates)
    width = max(own, twins or 0.0)
    if twins == width:
        source = f"equal models differ by ±{math.expm1(width):.1%} in a run"
    else:
        source = f"the ratio to the baseline is known to ±{math.expm1(width):.1%} in a run"
    if pruned is None:
        width = math.hypot(width, width)
        limit, source = detectable(width), f"{source}, ±{math.expm1(width):.1%} between two"
    else:
        ratio = math.exp(estimates[0].mean)
        limit, source = ratio * (1 + detectable(width)) - 1, f"measured {ratio:.3f}; {source}"
        if twins is not None and limit > 0 and math.log1p(limit) < twins:
            limit = detectable(twins)
    if detectable(width) > MOST:
        draft.warn(f"{key[1]} at '{_line(key[0])}': {source}: below the noise, not gated; measure more rounds", "  ")
        return
    points = yaml.safe_dump(glob.escape(key[0]), default_style='"', width=10**6).strip()
    draft.lines.append(f"  - {{metric: {key[1]}, points: {points}, max_slowdown: {_up(limit):g}}}  # {source}")


def _over_baseline(run: Run, one: Candidate, key: Key) -> LogMean | None:
    """The candidate's ratio to the run's baseline; of the baseline itself its own figure. None for too few rounds."""
    point, metric = key[0], METRICS[key[1]]
    mine, base = (
        {
            round_: value
            for series in arm.series
            if series.point == point
            for round_, value in rounds_of(series, metric).items()
        }
        for arm in (one, run.candidate(run.baseline))
    )
    arms = common_rounds(mine, base)
    if len(arms[0]) < 2 or not positive(*arms):
        return None
    return log_mean(arms[0]) if one.name == run.baseline else paired_log_mean(*arms)


def _memory(run: Run, gated: Sequence[Candidate], pruned: str | None) -> list[str]:
    """Growth of the files, which is exact, and of the peak, which is one figure a run."""
    dense = run.candidate(run.baseline)
    kept = [name for name in ("weights", "peak") if all(_bytes(one, name) for one in (dense, *gated))]
    if not kept:
        return []
    twin = next((one for one in run.candidates if one.notes.get("aa_of") == run.baseline), None)
    lines = ["memory:"]
    for name in (name for name in MEMORY_NAMES if name in kept):
        base = _bytes(dense, name)
        growth = 0.0 if pruned is None else _bytes(gated[0], name) / base - 1
        why = "bytes on the disk are exact"
        if name == "peak":
            apart = abs(_bytes(twin, name) / base - 1) if twin is not None and _bytes(twin, name) else None
            why = "one figure a run, without an interval; " + (
                "no equal model was measured beside it" if apart is None else f"equal models differ by {apart:.2%}"
            )
            growth += max(LEAST_MEMORY, 2 * (apart or 0.0))
        lines.append(f"  {name}: {_up(growth):g}  # {why}")
    return lines


def _bytes(one: Candidate, name: MemoryName) -> float:
    return float(getattr(one.memory, f"{name}_bytes") or 0)


def _quality(gated: Sequence[Candidate], pruned: str | None) -> list[str]:
    measured = [one.quality for one in gated if one.quality is not None]
    if len(measured) < len(gated):
        return []
    if pruned is None:
        why = "the same text has no sampling error; 0.5 % is for other libraries' rounding"
        return ["quality:", f"  perplexity_ratio: {SAME_TEXT}  # {why}"]
    ends = [(name, getattr(measured[0], name)) for name in ("perplexity_ratio", "kl_mean", "same_top")]
    lines = []
    for name, found in ends:
        if found is not None:
            sign = -1 if name == "same_top" else 1
            end = found.value if found.low is None else (found.low if sign < 0 else found.high)
            lines.append(f"  {name}: {sign * _up(sign * end):g}  # measured {found.value:.4g}, its interval ends there")
    return ["quality:", *lines] if lines else []


def _up(value: float) -> float:
    """Rounded up to hundredths, past the last digit's own rounding."""
    return math.ceil(100 * value - 1e-9) / 100 + 0.0


def _line(text: str) -> str:
    """On one line of a comment, whatever a file says."""
    return " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())
