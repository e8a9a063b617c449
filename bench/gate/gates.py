"""The two gates: this commit against the last, and pruned against dense; and the noise they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError, CrepeError, GateFailed, GateInconclusive, GateInvalid
from ...store.reading import read_json
from ..run.result import Run, load_run, save_run
from ..run.statistics import noise_floor
from .arms import COMMITS, PRUNED, Arm, arm
from .budgets import TIME, Budgets, slowdown_budgets
from .checks import BelowNoise, HostMismatch, Pair
from .judge import judge
from .pytest_json import arm_of_file, arm_of_folder, is_pytest_json, parse_saved
from .verdict import Verdict

Limits = Budgets | float  # a whole budgets file, or one slow-down for everything
DEFAULT_METRICS = ("ttft_s", "tpot_s")
ERRORS: dict[str, type[CrepeError]] = {"FAIL": GateFailed, "INCONCLUSIVE": GateInconclusive, "INVALID": GateInvalid}


@dataclass(frozen=True)
class Options:
    """How two files are compared. `names`: only these candidates. below_noise: as of `relative.latencies`."""

    names: tuple[str, ...] = ()
    host_mismatch: HostMismatch = "refuse"
    below_noise: BelowNoise = "invalid"
    looks: int = 1


def gate_files(baseline: Path, new: Path, limits: Limits, options: Options | None = None) -> Verdict:
    """This commit against the last, from two run files, or two files or folders of pytest-benchmark's JSON.

    Raises ConfigError for what is neither, has no samples, or for two of different kinds.
    """
    chosen = options or Options()
    first, second = _read(baseline), _read(new)
    if isinstance(first, Run) and isinstance(second, Run):
        return gate_commits(first, second, limits, chosen)
    if isinstance(first, Arm) and isinstance(second, Arm):
        if chosen.names:
            raise ConfigError("--candidate chooses among the candidates of run files, and these are not")
        return _gate_benchmarks(first, second, limits, chosen)
    raise ConfigError(f"{baseline} and {new} are of different kinds: give two run files or two of pytest-benchmark")


def gate_commits(base: Run, new: Run, limits: Limits, options: Options | None = None) -> Verdict:
    """This commit against the last: the candidates that both runs hold, by ratios to the runs' own baselines.

    Without other names the runs' own baseline is not gated where there is anything else. Raises ConfigError for
    candidates that one of them lacks, or that were not measured.
    """
    chosen = options or Options()
    names = chosen.names or tuple(_usual(base)) or (base.baseline,)
    pairs: list[Pair] = []
    for name in names:
        for run in (base, new):
            _require_samples(run, name)
        pairs.append((arm(base, name, COMMITS), arm(new, name, COMMITS)))
    fresh = sorted(set(_usual(new)) - set(_usual(base)))
    notes = [f"not in the baseline run, so not gated: {', '.join(fresh)}"] if fresh else []
    return judge(pairs, _budgets(limits, pairs), COMMITS, chosen.host_mismatch, chosen.looks, notes, chosen.below_noise)


def gate_pruned(
    run: Run, names: Sequence[str], limits: Limits, looks: int = 1, below_noise: BelowNoise = "invalid"
) -> Verdict:
    """Pruned against dense: candidates of a run against its baseline, paired by round. Raises ConfigError."""
    if not names or run.baseline in names:
        raise ConfigError(f"name candidates other than the run's baseline '{run.baseline}'")
    for name in (run.baseline, *names):
        _require_samples(run, name)
    dense = arm(run, run.baseline, PRUNED)
    pairs = [(dense, arm(run, name, PRUNED)) for name in names]
    return judge(pairs, _budgets(limits, pairs), PRUNED, looks=looks, below_noise=below_noise)


def calibrate(path: Path, name: str) -> dict[str, float]:
    """Store with a run what its baseline and its candidate `name`, the same model measured twice, differ by (A/A).

    Returns the noise, half-widths of log-ratios by "POINT/METRIC". Raises ConfigError where they are not the same.
    """
    run = load_run(path)
    first, second = run.candidate(run.baseline), run.candidate(name)
    if name == run.baseline or (first.model_sha256, first.engine) != (second.model_sha256, second.engine):
        raise ConfigError(f"'{name}' is not the same model in the same engine as '{run.baseline}', measured once more")
    for one in (run.baseline, name):
        _require_samples(run, one)
    points = {series.point: series for series in second.series}
    noise: dict[str, float] = {}
    for series in first.series:
        if series.point in points:
            noise |= noise_floor(series, points[series.point])
    if not noise:
        raise ConfigError(f"{path} has fewer than two common rounds of '{run.baseline}' and '{name}'")
    save_run(run.model_copy(update={"noise": noise}), path)
    return noise


def raise_for(verdict: Verdict) -> None:
    """Raise the error whose exit code is the verdict's; nothing for PASS."""
    if verdict.status != "PASS":
        row = verdict.worst()
        count = verdict.count(verdict.status)
        more = f", and {count - 1} more" if count > 1 else ""
        text = f"{verdict.status}, {verdict.gate}: {row.candidate}: {row.place}: {row.reason}{more}"
        raise ERRORS[verdict.status](text)


def _usual(run: Run) -> list[str]:
    """Names of the candidates that are gated unless others are asked for: not the baseline, nor its A/A twin."""
    return [one.name for one in run.candidates if one.name != run.baseline and "aa_of" not in one.notes]


def _gate_benchmarks(base: Arm, new: Arm, limits: Limits, options: Options) -> Verdict:
    if base.paired != new.paired:
        raise ConfigError(f"{base.name} and {new.name} are a file and a folder: give two files or two folders")
    fresh = sorted({name for name, _ in new.cells.keys() - base.cells.keys()})
    notes = [f"not in the baseline, so not gated: {', '.join(fresh)}"] if fresh else []
    known = {key: cell for key, cell in new.cells.items() if key in base.cells}
    pair = (base, Arm(**(vars(new) | {"cells": known})))
    budgets = _budgets(limits, [pair])
    return judge([pair], budgets, COMMITS, options.host_mismatch, options.looks, notes, options.below_noise)


def _budgets(limits: Limits, pairs: Sequence[Pair]) -> Budgets:
    """A single slow-down holds for the usual latencies of a run and for every benchmark's time."""
    if isinstance(limits, Budgets):
        return limits
    measured = {metric for pair in pairs for one in pair for _, metric in one.cells}
    metrics = tuple(metric for metric in (*DEFAULT_METRICS, TIME) if metric in measured)
    if not metrics:
        raise ConfigError(f"nothing that --max-slowdown could be held against: no {' or '.join(DEFAULT_METRICS)}")
    return slowdown_budgets(limits, metrics)


def _read(path: Path) -> Run | Arm:
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise ConfigError(f"{path} holds no .json file")
        documents = [(file, read_json(file, ConfigError, lenient=True)) for file in files]
        if strange := [file for file, document in documents if not is_pytest_json(document)]:
            raise ConfigError(f"{strange[0]} is not from pytest-benchmark; of a folder each file must be")
        return arm_of_folder(path, [parse_saved(document, file) for file, document in documents])
    document = read_json(path, ConfigError, lenient=True)
    if is_pytest_json(document):
        return arm_of_file(parse_saved(document, path))
    return load_run(path)


def _require_samples(run: Run, name: str) -> None:
    measured = run.candidate(name).series
    empty = [series.point for series in measured if not any(visit.requests for visit in series.visits)]
    if not measured or empty:
        place = f" at {empty[0]}" if empty else ""
        raise ConfigError(f"the run '{run.name}' has no samples of '{name}'{place}")
