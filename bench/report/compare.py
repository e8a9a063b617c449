"""A run's candidates against its baseline: what the summary, the figures and the advice are derived from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

from ..run.metrics import METRICS, common_rounds, errors, rounds_of
from ..run.result import Candidate, Interval, Point, Run
from ..run.statistics import paired_ratio

Kind = Literal["dense", "pruned", "quantised", "pruned and quantised"]

LOW_BITS: Final = re.compile(r"(?:int|nf|fp|w)[2348](?!\d)|mxfp|awq|gptq", re.IGNORECASE)
PRUNED_FROM: Final = 0.05


@dataclass(frozen=True)
class PairedRatio:
    """A metric of a candidate over the baseline's at one point: ratio over shared rounds, or why there is none."""

    metric: str
    point: str
    ratio: Interval | None
    rounds: int
    reason: str | None = None


@dataclass(frozen=True)
class Entry:
    """A candidate with its place in the run (for colour and marker) and its comparisons with the baseline."""

    index: int
    candidate: Candidate
    kind: Kind
    baseline: bool
    pairs: dict[tuple[str, str], PairedRatio]
    weights: float | None
    same_engine: bool

    @property
    def name(self) -> str:
        return self.candidate.name

    def ratio(self, point: str, metric: str) -> Interval | None:
        """Candidate over baseline; 1 for the baseline itself."""
        if self.baseline:
            return Interval(value=1.0)
        pair = self.pairs.get((point, metric))
        return None if pair is None else pair.ratio

    def perplexity_ratio(self) -> Interval | None:
        """Perplexity over the baseline's, paired on the same text; 1 for the baseline where its own was measured."""
        quality = self.candidate.quality
        if quality is None:
            return None
        return Interval(value=1.0) if self.baseline else quality.perplexity_ratio


@dataclass(frozen=True)
class Comparison:
    """A run and its entries. `headline`: the point that stands for decoding speed; `loaded`: that with most at once."""

    run: Run
    entries: tuple[Entry, ...]

    @cached_property
    def baseline(self) -> Entry:
        return next(entry for entry in self.entries if entry.baseline)

    @property
    def others(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.baseline)

    @cached_property
    def headline(self) -> Point | None:
        """The decoding point with the fewest sequences at once, then the most output."""
        return min(self._decoding(), key=lambda point: (in_flight(point), -point.output_tokens), default=None)

    @cached_property
    def loaded(self) -> Point | None:
        """The decoding point with the most sequences at once; None where that is the headline."""
        most = max(self._decoding(), key=in_flight, default=None)
        return None if most is None or self.headline is None or in_flight(most) == in_flight(self.headline) else most

    @cached_property
    def prompt(self) -> Point | None:
        """The point with the longest prompt at the fewest sequences at once."""
        points = [point for point in self.run.workload.points if self._known(point, "ttft_s")]
        return min(points, key=lambda point: (-point.prompt_tokens, in_flight(point)), default=None)

    def noise(self, point: str, metric: str) -> float:
        """Half-width of the log-ratio of two equal candidates; 0 where no noise floor was measured."""
        return (self.run.noise or {}).get(f"{point}/{metric}", 0.0)

    def _decoding(self) -> list[Point]:
        return [point for point in self.run.workload.points if self._known(point, "decode_tokens_per_s")]

    def _known(self, point: Point, metric: str) -> bool:
        return any(rounds_of(entry.candidate.series_at(point.name), METRICS[metric]) for entry in self.entries)


def compare(run: Run) -> Comparison:
    """Every candidate of a run against its baseline, metric by metric and point by point."""
    baseline = run.candidate(run.baseline)
    ordered = [baseline, *(candidate for candidate in run.candidates if candidate.name != run.baseline)]
    return Comparison(run, tuple(_entry(index, candidate, baseline, run) for index, candidate in enumerate(ordered)))


def _entry(index: int, candidate: Candidate, baseline: Candidate, run: Run) -> Entry:
    is_baseline = candidate.name == baseline.name
    pairs = {} if is_baseline else {
        (point.name, name): pair(candidate, baseline, point.name, name)
        for point in run.workload.points
        for name in METRICS
    }  # fmt: skip
    whole = baseline.memory.weights_bytes
    size = candidate.memory.weights_bytes
    weights = size / whole if whole and size else None
    return Entry(index, candidate, kind_of(candidate), is_baseline, pairs, weights, candidate.engine == baseline.engine)


def pair(candidate: Candidate, baseline: Candidate, point: str, name: str) -> PairedRatio:
    """One metric at one point, over the rounds that both have."""
    measured = [one.series_at(point) for one in (candidate, baseline)]
    if not all(series.visits for series in measured):
        return PairedRatio(name, point, None, 0, "not measured at this point")
    left, right = common_rounds(*(rounds_of(series, METRICS[name]) for series in measured))
    if not left:
        return PairedRatio(name, point, None, 0, "no round in which both answered")
    try:
        ratio = paired_ratio(left, right)
    except ValueError as error:
        return PairedRatio(name, point, None, len(left), str(error))
    return PairedRatio(name, point, ratio, len(left))


def in_flight(point: Point) -> int:
    """How many sequences a point keeps going at once."""
    return point.batch if point.concurrency is None else point.concurrency


def kind_of(candidate: Candidate) -> Kind:
    """Pruned: a method, a pattern or counted zeros say so. Quantised: its format or precision is named as low-bit."""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in candidate.layers)
    zeros = sum(layer.shape[0] * layer.shape[1] * layer.sparsity for layer in candidate.layers)
    pruned = bool(candidate.method or candidate.pattern) or (weights > 0 and zeros / weights >= PRUNED_FROM)
    named = f"{candidate.format} {candidate.notes.get('precision', '')}"
    quantised = LOW_BITS.search(named) is not None
    if pruned:
        return "pruned and quantised" if quantised else "pruned"
    return "quantised" if quantised else "dense"


def failed_requests(entry: Entry) -> int:
    """How many of a candidate's requests failed."""
    return sum(len(errors(series)) for series in entry.candidate.series)
