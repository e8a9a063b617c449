"""Readers called without a command around them: a thousand spoilt files a second rather than ten.

A batch runs in a child with the limits of `server.py`. What is no CrepeError is a defect, as is a child that does not
come back: the line it was at is then the one that ended it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from crepe_deploy.bench.gate.budgets import load_budgets
from crepe_deploy.bench.gate.gates import gate_files
from crepe_deploy.bench.report.chapters import build_report
from crepe_deploy.bench.report.loading import load_groups
from crepe_deploy.bench.report.markdown import markdown
from crepe_deploy.bench.report.page import page
from crepe_deploy.bench.run.result import load_run
from crepe_deploy.bench.run.scenario import load_scenario
from crepe_deploy.serve.onnx_requests import Ask

from crepe_deploy.api.inspect import inspect
from crepe_deploy.documents import load_text
from crepe_deploy.errors import ConfigError, CrepeError
from crepe_deploy.packed.config import PackedConfig
from crepe_deploy.pruning.recipe import load_preset, load_recipe
from crepe_deploy.store.checkpoint import CheckpointReader, read_config
from crepe_deploy.store.gguf import check_gguf
from crepe_deploy.store.journal import open_journal
from crepe_deploy.store.manifest import load_manifest
from crepe_deploy.store.reading import read_json
from crepe_deploy.store.stock import check_tokenizer, config_of

from .corpus import Corpus
from .formats import spoil_file
from .server import MEMORY, OWN_SECONDS

BATCH = 250


@dataclass(frozen=True)
class Reader:
    """One way in for files of others: a sample, the file of it that is spoilt, and what reads it."""

    sample: str
    file: str  # "" where the sample is a file
    read: Callable[[Path], object]
    share: int = 1  # every how many inputs it gets one, where a reading takes seconds


def _ask(path: Path) -> object:
    return Ask.checked(read_json(path, ConfigError), "m", chat=True)


def _packed(root: Path) -> object:
    return PackedConfig.from_dict(read_config(root).get("quantization_config", {}))


def _charts(path: Path) -> object:
    """The report of a run, whose libraries may not warn of anything either."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        report = build_report(load_groups([path]))
        return page(report), markdown(report)


def _journal_of(name: str) -> Callable[[Path], object]:
    """Read the journal of a folder as the run whose first line it has, so that the lines behind it are read."""

    def read(root: Path) -> object:
        try:
            header = json.loads((root / name).read_bytes().splitlines()[0])
            identity = {key: value for key, value in header.items() if key not in ("version", "versions")}
        except (ValueError, IndexError, AttributeError, RecursionError):
            identity = {}
        return open_journal(root / name, identity, resume=True)

    return read


READERS: dict[str, Reader] = {
    "config": Reader("model", "config.json", lambda root: (read_config(root), config_of(root))),
    "tokenizer": Reader("model", "tokenizer.json", check_tokenizer),
    "tokenizer settings": Reader("model", "tokenizer_config.json", check_tokenizer),
    "safetensors": Reader("model", "model.safetensors", CheckpointReader),
    "shards": Reader("sharded", "model.safetensors.index.json", CheckpointReader),
    "manifest": Reader("pruned", "manifest.json", load_manifest),
    "packed config": Reader("packed", "config.json", _packed),
    "packed weights": Reader("packed", "model.safetensors", inspect),
    "gguf": Reader("model.gguf", "", check_gguf),
    "recipe": Reader("recipe.yaml", "", load_recipe),
    "preset": Reader("preset.json", "", load_preset),
    "text": Reader("text.txt", "", load_text),
    "json lines": Reader("text.jsonl", "", load_text),
    "parquet": Reader("text.parquet", "", load_text),
    "run": Reader("run.json", "", load_run),
    "run of a report": Reader("run.json", "", lambda path: load_groups([path])),
    "charts of a report": Reader("charts.json", "", _charts, share=25),
    "pytest-benchmark": Reader("benchmark.json", "", lambda path: gate_files(path, path, 0.1)),
    "budgets": Reader("budgets.yaml", "", load_budgets),
    "journal of tyr": Reader("stopped-tyr", "out.work/journal.jsonl", _journal_of("out.work/journal.jsonl")),
    "journal of search": Reader("stopped-search", "preset.json.journal", _journal_of("preset.json.journal")),
    "request": Reader("request.json", "", _ask),
    "scenario": Reader("suite.yaml", "", load_scenario),
}


def spoilt(name: str, seed: int, index: int, corpus: Corpus, place: Path) -> tuple[Path, str]:
    """The input of this number for a reader, written below `place`; and what was done to it."""
    reader = READERS[name]
    target = place / reader.sample
    if not target.exists():
        corpus.copy(reader.sample, place)
    file = target / reader.file  # of "": itself
    file.write_bytes((corpus.path(reader.sample) / reader.file).read_bytes())
    return target, spoil_file(file, Random(f"readers/{name}/{seed}/{index}"))


def attempt(name: str, seed: int, index: int, corpus: Corpus, place: Path) -> dict[str, Any]:
    """One input read here and now: a line for the figures."""
    target, what = spoilt(name, seed, index, corpus, place)
    line: dict[str, Any] = {"reader": name, "index": index, "outcome": "read"}
    try:
        READERS[name].read(target)
    except CrepeError as error:
        line |= {"outcome": "refused", "message": f"{type(error).__name__}: {error}"[:60]}
    except Exception:  # noqa: BLE001 - whatever it is, it is the defect looked for
        line |= {"outcome": "defect", "what": what, "details": traceback.format_exc()[-3000:]}
    return line


def batch(name: str, seed: int, indices: Sequence[int], corpus: Corpus, place: Path) -> list[dict[str, Any]]:
    """A line for each of these inputs; one that ends the child that reads it, or takes too long there, is a defect."""
    lines: list[dict[str, Any]] = []
    while len(lines) < len(indices):
        left, said = indices[len(lines) :], place / "lines"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        if (pid := os.fork()) == 0:
            _child(name, seed, left, corpus, place, said)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        lines += [json.loads(line) for line in said.read_text().splitlines()] if said.exists() else []
        if code and len(lines) < len(indices):
            index = indices[len(lines)]
            lines.append(
                {"reader": name, "index": index, "outcome": "defect", "what": f"ended by {code}", "details": ""}
            )
    return lines


def _child(name: str, seed: int, indices: Sequence[int], corpus: Corpus, place: Path, said: Path) -> None:
    code = 70
    try:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        with said.open("w") as file:
            for index in indices:
                signal.setitimer(signal.ITIMER_VIRTUAL, OWN_SECONDS)  # nobody handles it: it ends the child
                file.write(json.dumps(attempt(name, seed, index, corpus, place)) + "\n")
                file.flush()
        code = 0
    finally:
        os._exit(code)


def work(seed: int, number: int, worker: int, jobs: int, corpus: Corpus, place: Path, out: Path) -> None:
    """This worker's share of `number` inputs for each reader, counted into `out`, readers that are done left out."""
    for name in READERS:
        done = out / f"reader-{name.replace(' ', '-')}-{worker}.json"
        if done.exists():
            continue
        outcomes: Counter[str] = Counter()
        messages: set[str] = set()
        defects: list[dict[str, Any]] = []
        mine = range(worker, number // READERS[name].share, jobs)
        for start in range(0, len(mine), BATCH):
            for line in batch(name, seed, mine[start : start + BATCH], corpus, place):
                outcomes[line["outcome"]] += 1
                messages.add(line.get("message", ""))
                defects += [line] if line["outcome"] == "defect" else []
        record = {"reader": name, "outcomes": dict(outcomes), "messages": sorted(messages), "defects": defects}
        done.write_text(json.dumps(record) + "\n")
