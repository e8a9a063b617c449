"""Measuring a scenario: every candidate in a process of its own, one working at a time, there and back: A B C C B A.

All candidates stay loaded, so that a round's visits to a point follow one another within seconds and meet the same
neighbours on the machine. Nothing is written here but the journal's rounds: a run exists when every visit was made.
"""

from __future__ import annotations

import datetime
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final

from ...errors import CheckpointError, ConfigError
from ...nearest import meant
from ...progress import Progress, silent
from ...serve.engines import ENGINES
from ...serve.engines.base import Settings
from ...store.checkpoint import CheckpointReader
from ...store.journal import Journal
from . import served_worker
from .candidate import (
    describe_folder,
    kv_token_bytes,
    limits,
    manifest_of,
    model_sha256,
    step_bytes,
    weight_files,
    weights_bytes,
)
from .environment import record_environment
from .noted import VISITS, Noted
from .result import Candidate, Memory, Point, Quality, Run, Series, Visit
from .scenario import AGAIN, CandidateSpec, Scenario
from .served_worker import SERVED, Backend, ServedWorker
from .statistics import noise_floor
from .worker import OfflineWorker, Turn, Worker, offline_command

_GIB: Final = 1 << 30

Start = Callable[[CandidateSpec, Scenario], Worker]
Qualities = dict[str, Quality]
Facts = Mapping[str, Mapping[str, Any]]  # of each candidate, what is known without running it


def check(scenario: Scenario) -> None:
    """Refuse what cannot be measured, before anything is loaded. Raises ConfigError, CheckpointError, MissingExtra."""
    points = [spec.point() for spec in scenario.points]
    vocabularies: dict[str, int | None] = {}
    for spec in scenario.specs():
        require_engine(spec.name, str(spec.engine), spec.options)
        _check_folder(spec, scenario)
        for point in points:
            _check_point(spec, point)
        vocabularies[spec.name] = limits(spec.folder)[0]
    if None in vocabularies.values():
        raise ConfigError(f"config.json gives no vocab_size for {[n for n, size in vocabularies.items() if not size]}")
    if len(set(vocabularies.values())) > 1:
        sizes = ", ".join(f"{name} {size}" for name, size in vocabularies.items())
        raise ConfigError(f"candidates get the same prompts, and their vocabularies differ: {sizes}")
    if scenario.quality is not None and not scenario.quality.text.is_file():
        raise ConfigError(f"quality.text {scenario.quality.text} is no file{_remedy(scenario)}")


def _check_folder(spec: CandidateSpec, scenario: Scenario) -> None:
    if not (spec.folder / "config.json").is_file():
        raise CheckpointError(f"candidate '{spec.name}': {spec.folder} is no model folder{_remedy(scenario)}")
    if not weight_files(spec.folder):
        raise CheckpointError(f"candidate '{spec.name}': {spec.folder} holds no weights{_remedy(scenario)}")
    if any(spec.folder.glob("*.safetensors")):
        CheckpointReader(spec.folder)  # headers alone


def require_engine(candidate: str, engine: str, options: dict[str, Any]) -> None:
    """Refuse an engine that is not there, for the candidate of this name. Raises ConfigError, MissingExtra."""
    if engine == SERVED:
        served_worker.require(options)
    elif engine in ENGINES:
        ENGINES[engine].require(options)
    else:
        names = [*ENGINES, SERVED]
        raise ConfigError(
            f"candidate '{candidate}': no engine '{engine}'; there are {', '.join(names)}{meant(engine, names)}"
        )


def _check_point(spec: CandidateSpec, point: Point) -> None:
    context, needed = limits(spec.folder)[1], point.prompt_tokens + point.output_tokens
    if context is not None and needed > context:
        raise ConfigError(f"point {point.name} needs {needed} tokens, and the context of '{spec.name}' holds {context}")
    if spec.engine == SERVED and (point.concurrency is None or point.batch != 1):
        raise ConfigError(f"point {point.name} is in lock step: engine {SERVED} of '{spec.name}' takes a concurrency")
    if spec.engine != SERVED and point.concurrency is not None:
        raise ConfigError(
            f"point {point.name} has a concurrency: engine {spec.engine} of '{spec.name}' serves none, {SERVED} does"
        )


def _remedy(scenario: Scenario) -> str:
    return f"; make it with: {scenario.made_by}" if scenario.made_by else ""


class Session:
    """A scenario with every candidate loaded; more rounds can be added before asking for the run.

    Use it in `with`, after `check`: on leaving, every process that it started has ended. `step` is told of the visits
    made. facts: as of `facts_of`, where they are known. noted: what earlier starts measured, as of `noted_by`.
    """

    def __init__(
        self, scenario: Scenario, command: str, start: Start | None = None, facts: Facts | None = None,
        noted: Noted | None = None,
    ) -> None:  # fmt: skip
        self.scenario, self.command = scenario, command
        self.specs = scenario.specs()
        self.points = [spec.point() for spec in scenario.points]
        self.rounds = 0
        self._start = start or start_worker
        self._workers: dict[str, Worker] = {}
        self._facts = facts
        self._noted = noted or noted_by(scenario)
        self._stack = ExitStack()

    def __enter__(self) -> Session:
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def load(self, step: Progress = silent) -> None:
        """Read every candidate's files, then start one after the other. Raises VerifyError, CrepeError."""
        self._facts = self._facts or facts_of(self.scenario)
        for index, spec in enumerate(self.specs):
            worker = self._start(spec, self.scenario)
            self._stack.callback(worker.close)
            self._workers[spec.name] = worker
            step(index + 1, len(self.specs))

    def warm_up(self, step: Progress = silent) -> None:
        """Rounds of which nothing is kept."""
        for _ in self._turns(range(-self.scenario.warmup, 0), step):
            pass

    def measure(self, rounds: int, step: Progress = silent) -> None:
        """Add `rounds` rounds; those that an earlier start has measured are not measured again."""
        self.rounds += rounds
        missing = range(len(self._noted.rounds), self.rounds)
        turns = self._turns(missing, step)
        for _ in missing:
            visits: dict[str, dict[str, list[Visit]]] = {spec.name: {} for spec in self.specs}
            for name, point, visit in itertools.islice(turns, self._turns_in_round):
                visits[name].setdefault(point.name, []).append(visit)
            self._noted.add_round(
                seconds=time.perf_counter() - self._began, visits=visits,
                load_s={name: worker.ready["load_s"] for name, worker in self._workers.items()},
                peak_bytes={name: worker.peak_bytes() for name, worker in self._workers.items()},
            )  # fmt: skip

    @property
    def _turns_in_round(self) -> int:
        return len(self.points) * len(self._workers) * VISITS

    def _turns(self, rounds: range, step: Progress) -> Iterator[tuple[str, Point, Visit]]:
        vocabulary = int(limits(self.specs[0].folder)[0] or 0)
        total, done = len(rounds) * self._turns_in_round, 0
        for index in rounds:
            for point in self.points:
                turn = Turn(point, index, self.scenario.seed, vocabulary)
                for name in order([*self._workers], index):
                    visit = self._workers[name].visit(turn)
                    done += 1
                    step(done, total)
                    yield name, point, visit

    def run(self, qualities: Qualities | None = None) -> Run:
        """What was measured so far."""
        candidates = [
            self._candidate(spec, (qualities or {}).get(spec.name.removesuffix(AGAIN))) for spec in self.specs
        ]
        threads, earlier = self.scenario.thread_count(), self._noted.earlier
        load = (earlier[0].start if earlier else self._noted.start).load
        return Run(
            name=self.scenario.name,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=self.command,
            seconds=sum(round.seconds for round in earlier) + time.perf_counter() - self._began,
            environment=record_environment(threads, load, child_variables(self.scenario)),
            workload=self.scenario.workload(),
            baseline=self.scenario.baseline_name,
            candidates=candidates,
            noise=self._noise(candidates) if self.scenario.aa else None,
            resumed=self._noted.resumed(),
        )

    def _candidate(self, spec: CandidateSpec, quality: Quality | None) -> Candidate:
        assert self._facts is not None
        worker, rounds = self._workers[spec.name], self._noted.rounds[: self.rounds]
        return Candidate(
            **self._facts[spec.name],
            quality=quality,
            load_s=[*(round.load_s[spec.name] for round in self._noted.earlier), worker.ready["load_s"]],
            memory=_memory(spec, worker, [round.peak_bytes[spec.name] for round in rounds]),
            series=[
                Series(point=point.name, visits=[v for round in rounds for v in round.visits[spec.name][point.name]])
                for point in self.points
            ],
            notes=self._notes(spec, worker),
        )

    def _notes(self, spec: CandidateSpec, worker: Worker) -> dict[str, Any]:
        notes: dict[str, Any] = {
            key: worker.ready[key] for key in ("dtype", "linears", "kernels") if key in worker.ready
        }
        notes |= {"options": spec.options} if spec.options else {}
        notes |= {"aa_of": self.scenario.baseline_name} if is_again(spec, self.scenario) else {}
        if any(spec.folder.glob("*.safetensors")):
            notes["step_bytes"] = step_bytes(spec.folder)
        return notes

    def _noise(self, candidates: list[Candidate]) -> dict[str, float]:
        first, again = candidates[:2]
        floors: dict[str, float] = {}
        for one, other in zip(first.series, again.series, strict=True):
            floors |= noise_floor(one, other)
        return floors


def order(names: Sequence[str], round: int) -> list[str]:
    """There and back, beginning one further each round: the candidate that turns comes twice in a row and finds warm
    caches, so every one must take that place equally often."""
    start = round % len(names)
    there = [*names[start:], *names[:start]]
    return [*there, *reversed(there)]


def is_again(spec: CandidateSpec, scenario: Scenario) -> bool:
    """Whether it is the second spec of an A/A run."""
    return scenario.aa and spec.name == scenario.baseline_name + AGAIN


def noted_by(scenario: Scenario, journal: Journal | None = None, *, resumed: bool = False) -> Noted:
    """What earlier starts of a scenario have noted in `journal`. Raises ConfigError where that is damaged."""
    names = [spec.name for spec in scenario.specs()]
    return Noted(names, [spec.point().name for spec in scenario.points], journal, resumed=resumed)


def facts_of(scenario: Scenario) -> Facts:
    """What is known of every candidate from its files, each read once. Raises VerifyError, CheckpointError."""
    return {spec.name: _facts(spec, scenario) for spec in scenario.specs()}


def _facts(spec: CandidateSpec, scenario: Scenario) -> dict[str, Any]:
    known = describe_folder(spec.folder)
    return {
        **known,
        "name": spec.name,
        "engine": spec.engine,
        "folder": str(spec.folder),
        "model_sha256": model_sha256(spec.folder, manifest_of(spec.folder)),
        "kind": known["kind"] + (", measured again" if is_again(spec, scenario) else ""),
    }


def _memory(spec: CandidateSpec, worker: Worker, peaks: Sequence[int | None]) -> Memory:
    """peaks: after each round."""
    return Memory(
        weights_bytes=weights_bytes(spec.folder),
        linears_bytes=worker.ready.get("linear_bytes"),
        loaded_bytes=worker.ready.get("loaded_bytes"),
        peak_bytes=max((size for size in (*peaks, worker.peak_bytes()) if size is not None), default=None),
        kv_token_bytes=kv_token_bytes(spec.folder, str(worker.ready.get("dtype"))),
    )


def start_worker(spec: CandidateSpec, scenario: Scenario, backend: Backend | None = None) -> Worker:
    """The candidate's process, loaded; `backend` serves it where it asks for a server."""
    asked, variables = settings(spec, scenario), child_variables(scenario)
    if spec.engine != SERVED:
        return OfflineWorker(spec.name, offline_command(str(spec.engine), spec.folder, asked), variables)
    extra = ["--max-model-len", str(asked.max_tokens), "--max-num-seqs", str(max(8, asked.max_batch))]
    dtype = ["--dtype", asked.dtype] if asked.dtype != "auto" else []
    del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return ServedWorker(
        spec.name, spec.folder, [*extra, "--block-size", "32", *dtype], spec.options, variables, backend or Backend()
    )


def settings(spec: CandidateSpec, scenario: Scenario) -> Settings:
    """How the engine is to be loaded: room for the longest sequence and the largest batch, and not more."""
    points = [spec.point() for spec in scenario.points]
    longest = max(point.prompt_tokens + point.output_tokens for point in points)
    rounded = 32 * math.ceil((longest + 1) / 32)
    context = limits(spec.folder)[1]
    return Settings(
        max_tokens=rounded if context is None else min(rounded, context),
        max_batch=max(point.concurrency or point.batch for point in points),
        dtype=str(spec.dtype),
        threads=scenario.thread_count(),
        options=spec.options,
    )


def child_variables(scenario: Scenario) -> dict[str, str]:
    """Environment of a candidate: vLLM in one process, nothing bound to a core, a key-value cache that is enough."""
    threads = str(scenario.thread_count())
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(_cache_gib(scenario)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _cache_gib(scenario: Scenario) -> int:
    specs = scenario.specs()
    needed = [
        (kv_token_bytes(spec.folder, "float32") or 0) * options.max_tokens * options.max_batch
        for spec, options in ((spec, settings(spec, scenario)) for spec in specs)
    ]
    return max(1, math.ceil(max(needed) / _GIB))
