"""The one function that decides a gate, pure: arms and budgets in, rows with a status and a reason out.

Order: failed requests and output lengths, then whether host, workload and model agree; whatever fails there makes the
gate INVALID and nothing else is judged. Then absolute objectives, relative latency and throughput, memory, quality.

    PASS          the interval's upper end is within the budget
    FAIL          its lower end is beyond the budget, after correction for the number of rows, and the difference
                  exceeds the budget's absolute floor
    INCONCLUSIVE  neither: more rounds may decide
    INVALID       it cannot be judged: not measured, or a budget that lies below the noise floor

To pass, every row must pass, so passing needs no correction; to fail, one row suffices, so failing does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..run.statistics import LEVEL
from . import checks, relative
from .arms import COMMITS, Gate
from .budgets import Budgets
from .checks import BelowNoise, HostMismatch, Pair
from .verdict import SEVERITY, Row, Verdict


def judge(
    pairs: Sequence[Pair],
    budgets: Budgets,
    gate: Gate,
    host_mismatch: HostMismatch = "refuse",
    looks: int = 1,
    notes: Sequence[str] = (),
    below_noise: BelowNoise = "invalid",
) -> Verdict:
    """Judge pairs of (baseline, candidate) arms; `looks` shares the error level among that many planned looks.

    `notes` are added to its own. below_noise: as of `relative.latencies`. Raises ValueError for no pairs.
    """
    if not pairs:
        raise ValueError("a verdict needs at least one pair of arms")
    level = 1 - (1 - LEVEL) / looks
    foreign = any(checks.differences(pair, "host") for pair in pairs)
    rows = [row for pair in pairs for row in checks.comparable(pair, host_mismatch)] or [
        *([] if foreign else checks.objectives(pairs, budgets, level)),
        *relative.latencies(pairs, budgets.relative, gate, level, foreign=foreign, below_noise=below_noise),
        *checks.memories(pairs, budgets, foreign=foreign),
        *checks.qualities(pairs, budgets, gate),
    ]
    if not rows:  # objectives alone, on another machine
        rows = [checks.nothing_left(pairs[0])]
    return Verdict(
        gate=gate,
        status=next(status for status in SEVERITY if any(row.status == status for row in rows)),
        baseline=", ".join(dict.fromkeys(base.name for base, _ in pairs)),
        candidates=[new.name for _, new in pairs],
        level=level,
        looks=looks,
        rows=rows,
        notes=[*notes, *_notes(pairs, budgets, gate, rows, foreign)],
    )


def _notes(pairs: Sequence[Pair], budgets: Budgets, gate: Gate, rows: list[Row], foreign: bool) -> Iterator[str]:
    """What a reader must know besides the rows."""
    if foreign and any(row.check == "latency" for row in rows):
        hosts = "; ".join(dict.fromkeys(text for pair in pairs for text in checks.differences(pair, "host")))
        yield f"the runs come from two machines ({hosts}): only ratios within each run are compared"
        if budgets.objectives:
            yield f"{len(budgets.objectives)} absolute objectives were skipped: they hold on one machine only"
    if any(row.comparison == relative.UNPAIRED for row in rows):
        yield (
            "unpaired rows: intervals hold what varied within each run, not how the machine changed between the two; "
            "measure both alternately, or with a common control, to exclude that"
        )
    if any(row.check == "latency" for row in rows) and not any(base.noise or new.noise for base, new in pairs):
        yield "no A/A noise is stored with these runs, so budgets were not held against it"
    for base, new in pairs:
        if base.engine != new.engine and gate != COMMITS:
            yield f"{new.name} ran in {new.engine}, {base.name} in {base.engine}: ratios are the engines' too"
    if gate == COMMITS:
        changes = [text for base, new in pairs for text in _changes(base.versions, new.versions, new.name)]
        yield from dict.fromkeys(changes)


def _changes(base: Mapping[str, Any], new: Mapping[str, Any], name: str) -> list[str]:
    changed = [key for key in sorted(base.keys() | new.keys()) if base.get(key) != new.get(key)]
    return [
        f"{name}: its weights are not the baseline run's, so pruning itself changed"
        if key == "weights"
        else f"{key} changed from {base.get(key)} to {new.get(key)}"
        for key in changed
    ]
