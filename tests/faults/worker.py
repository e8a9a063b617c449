"""A worker of `python -m tests.faults`: its share of the inputs and of the faults, each kept as a line at once."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import cases, faults, readers, run, server
from .corpus import CALIBRATION, Corpus


def _prepared(options: argparse.Namespace) -> tuple[Corpus, Path]:
    """Everything imported, and a scratch folder in memory where there is one."""
    if options.kinds:
        for name in set(cases.KINDS) - set(options.kinds.split(",")):
            del cases.KINDS[name]
    if options.quick:
        cases.WRITTEN[:] = [name for name in cases.WRITTEN if name not in ("onnx", "genai")]
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="crepe-deploy-faults-", dir=memory if memory.is_dir() else None))
    place.chmod(0o755)
    server.import_everything()
    corpus = Corpus(place / "corpus")
    text, model = str(corpus.path("text.txt")), str(corpus.path("model"))
    out = str(place / "warm" / "out")
    calibration = ["--calib", text, *CALIBRATION]
    commands = [
        ["plan", model], ["prune", model, "--out", out, "--recipe", "best", *calibration], ["inspect", out],
        ["verify", out], ["export", out, "--format", "packed", "--out", f"{out}-packed"],
        ["export", out, "--format", "int8", "--out", f"{out}-int8"], ["eval", out, "--text", text, "--window", "16"],
        ["report", str(corpus.path("run.json")), "--out", f"{out}-report"],
        ["gate", str(corpus.path("run.json")), str(corpus.path("run.json")), "--max-slowdown", "1"],
        ["eval", f"{out}-packed", "--text", text, "--window", "16"],
        ["prune", str(corpus.path("model.gguf")), "--out", f"{out}-gguf", "--method", "magnitude"], ["plan", out + "x"],
        ["doctor"],
    ]  # fmt: skip
    server.warm(commands, place / "warm")
    return corpus, place


def show(options: argparse.Namespace) -> int:
    """Run these inputs once more, a line for each; a single one in view, its folder kept."""
    corpus, place = _prepared(options)
    if len(options.only) > 1:
        lines = [run.attempt(options.seed, index, corpus, place / "run").line() for index in options.only]
        shutil.rmtree(place)
        print(*(json.dumps(line) for line in lines), sep="\n")
        return int(any("defects" in line for line in lines))
    verdict = run.attempt(options.seed, options.only[0], corpus, place / "run", keep=True)
    print(json.dumps(verdict.line(), indent=1).replace("\\n", "\n"))
    print(verdict.what, verdict.outcome.argv, verdict.outcome.stderr, place, sep="\n")
    return int(bool(verdict.outcome.defects))


def work(options: argparse.Namespace) -> int:
    """This worker's share, as far as it is not done yet."""
    corpus, place = _prepared(options)
    try:
        _share(
            options,
            "inputs",
            options.inputs,
            lambda index: run.attempt(options.seed, index, corpus, place / "run").line(),
        )
        if options.readers:
            readers.work(
                options.seed, options.readers, options.worker, options.jobs, corpus, place / "reader", options.out
            )
        if options.faults:
            bench = faults.Bench(corpus, place)
            planned = faults.plan(bench, options.seed, options.faults)
            _share(options, "faults", len(planned), lambda index: bench.strike(*planned[index]))
    finally:
        shutil.rmtree(place)
    return 0


def _share(options: argparse.Namespace, name: str, number: int, one: Callable[[int], dict[str, Any]]) -> None:
    """Run the numbers that fall to this worker and are not yet in its file."""
    place = options.out / f"{name}-{options.worker}.jsonl"
    done = len(place.read_bytes().splitlines()) if place.exists() else 0
    with place.open("a") as file:
        for index in range(options.worker + done * options.jobs, number, options.jobs):
            file.write(json.dumps(one(index)) + "\n")
            file.flush()
