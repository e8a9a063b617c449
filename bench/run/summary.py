"""A run as a table for the terminal: what each candidate took, and how much less than the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Final

from .metrics import METRICS, common_rounds, errors, rounds_of
from .result import Candidate, Interval, Run
from .statistics import paired_ratio, positive

SHOWN: Final = ("ttft_s", "tpot_s", "itl_p99_s", "output_tokens_per_s")
_SCALE: Final = {"s": (1e3, "ms"), "tokens/s": (1.0, "tokens/s")}


def summary_lines(run: Run) -> list[str]:
    """For each point and metric a line a candidate; memory and quality below; conditions last."""
    lines: list[str] = []
    for point in run.workload.points:
        for name in SHOWN:
            lines += _metric_lines(run, point.name, name)
    lines += ["", "memory and time to load (lower is better)", *map(_memory_line, run.candidates)]
    quality = [line for candidate in run.candidates for line in _quality_line(candidate)]
    said = "quality: perplexity, its ratio and mean KL (lower is better), same top token (higher is better)"
    lines += [said, *quality] if quality else []
    host = run.environment
    rounds = max((len(rounds_of(s, METRICS["ttft_s"])) for c in run.candidates for s in c.series), default=0)
    stops = "".join(f", resumed after round {one.after_round}" for one in run.resumed)
    lines.append(
        f"{host.host.cpu}, {host.host.isa}, {host.threads} thread(s), {rounds} rounds{stops}, "
        f"load {host.load[0]:.2f} before and {host.load[1]:.2f} after; gains (higher is better) are over "
        f"{run.baseline}, paired by round, with 95 % intervals"
    )
    return lines


def failures(run: Run) -> list[str]:
    """What failed requests said, each with its candidate and point."""
    return [
        f"{candidate.name} at {series.point}: {error}"
        for candidate in run.candidates
        for series in candidate.series
        for error in errors(series)
    ]


def gain(run: Run, candidate: Candidate, point: str, metric: str) -> Interval | None:
    """How many times better than the baseline, above 1 means better; None where rounds are missing or took no time."""
    kind = METRICS[metric]
    arms = (rounds_of(one.series_at(point), kind) for one in (run.candidate(run.baseline), candidate))
    before, after = common_rounds(*arms)
    if candidate.name == run.baseline or not positive(before, after):
        return None
    return paired_ratio(before, after) if kind.better == "lower" else paired_ratio(after, before)


def _metric_lines(run: Run, point: str, name: str) -> Iterator[str]:
    metric = METRICS[name]
    scale, unit = _SCALE[metric.unit]
    values = {c.name: rounds_of(c.series_at(point), metric) for c in run.candidates}
    if not any(values.values()):
        return
    yield f"{point}: {metric.title}, {unit} ({metric.better} is better)"
    for candidate in run.candidates:
        figures = values[candidate.name].values()
        median = f"{scale * statistics.median(figures):12.2f}" if figures else f"{'-':>12}"
        yield f"  {candidate.name:<28}{median}   {_gain_text(gain(run, candidate, point, name))}".rstrip()


def _gain_text(interval: Interval | None) -> str:
    if interval is None:
        return ""
    bounds = "" if interval.low is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{interval.value:.3f}x{bounds}"


def _memory_line(candidate: Candidate) -> str:
    memory = candidate.memory
    parts = {"files": memory.weights_bytes, "linear layers": memory.linears_bytes, "loaded": memory.loaded_bytes,
             "peak": memory.peak_bytes}  # fmt: skip
    sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in parts.items() if size is not None)
    return f"{candidate.name}: {sizes}" + (f"; loaded in {min(candidate.load_s):.1f} s" if candidate.load_s else "")


def _quality_line(candidate: Candidate) -> Iterator[str]:
    quality = candidate.quality
    if quality is not None:
        against = {"ratio": quality.perplexity_ratio, "mean KL": quality.kl_mean, "same top": quality.same_top}
        rest = ", ".join(f"{name} {value.value:.4g}" for name, value in against.items() if value is not None)
        yield f"{candidate.name}: perplexity {quality.perplexity.value:.4g}{', ' + rest if rest else ''}"
