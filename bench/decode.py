"""How much faster a packed model decodes than the dense one with the same zeros, in a serving engine on the CPU.

    python -m crepe_deploy.bench.decode [--engine vllm|transformers] [--model llama-1b | DENSE PACKED [PACKED ...]]
        [--patterns 2:4,16:32] [--rounds 7] [--threads 2] [--out bench/results/decode.json]

Each candidate lives in a process of its own and only one of them works at a time, in the order A B C C B A of each
round. A decode step is (t(1 + k tokens) - t(1 token)) / k; prefill is a fresh prompt of 512 tokens and one new token.
Ratios above 1 mean that packed is faster; they are taken within rounds, with a bootstrap interval over the rounds.
Figures in `cpu_s` are processor seconds of all threads: with one thread, what other work on the machine disturbs less.
`llama-1b` is a random bf16 checkpoint of Llama-3.2-1B's shape, pruned by magnitude. Its head is dense in every
candidate, so a step cannot gain more than `bytes_bound`, the bytes that a dense step reads over those of a packed one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..checkpoint import CheckpointReader, read_json
from ..errors import CrepeError
from ..manifest import load_manifest, versions
from .kernels import environment

PROMPT_TOKENS: Final = 64  # a batch size that the dispatcher measures when it loads
PREFILL_TOKENS: Final = 512
BATCHES: Final = (1, 4)
RESAMPLES: Final = 2000
DENSE: Final = "dense"
CLOCKS: Final = ("s", "cpu_s")

Sample = dict[str, float]


@dataclass(frozen=True)
class Work:
    """What one visit to a candidate measures."""

    vocabulary: int
    steps: int
    prefill: int = PREFILL_TOKENS
    batches: tuple[int, ...] = BATCHES


class Child:
    """A candidate's process. `ready` is what it said about itself; raises CrepeError when it ends by itself."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.command = command
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )
        self.ready = self._read()

    def time(self, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        """What continuing `prompts`, in one batch, by `tokens` tokens takes: `s` and, over all threads, `cpu_s`."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading tells why
            print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self.process.stdin, flush=True)
        self.last = self._read()
        return self.last

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise CrepeError(f"'{' '.join(self.command)}' ended with exit code {self.process.returncode}")
        message: dict[str, Any] = json.loads(line)
        return message


def visit(child: Child, work: Work, generator: random.Random) -> Sample:
    """One sample of each figure: seconds of a decode step for each batch, seconds of a prefill; wall and processor."""
    sample = {}
    for batch in work.batches:
        prompts = [random_prompt(PROMPT_TOKENS, work, generator) for _ in range(batch)]
        first, all_ = child.time(prompts, 1), child.time(prompts, 1 + work.steps)
        for clock in CLOCKS:
            sample[f"decode_b{batch}_{clock}"] = (all_[clock] - first[clock]) / work.steps
    prefill = child.time([random_prompt(work.prefill, work, generator)], 1)
    return sample | {f"prefill_{clock}": float(prefill[clock]) for clock in CLOCKS}


def random_prompt(length: int, work: Work, generator: random.Random) -> list[int]:
    """Token ids that no cache has seen."""
    return [generator.randrange(3, work.vocabulary) for _ in range(length)]


def interleave(children: dict[str, Child], work: Work, rounds: int) -> dict[str, list[Sample]]:
    """Every candidate's samples, two a round in the order A B C C B A; all are warmed up by a visit first."""
    generator = random.Random(0)
    samples: dict[str, list[Sample]] = {name: [] for name in children}
    for child in children.values():
        visit(child, work, generator)
    order = list(children)
    for index in range(rounds):
        for name in (*order, *reversed(order)):
            samples[name].append(visit(children[name], work, generator))
        seen = ", ".join(f"{name} {1e3 * found[-1]['decode_b1_s']:.1f} ms" for name, found in samples.items())
        print(f"round {index + 1} of {rounds}: {seen}", file=sys.stderr, flush=True)
    return samples


def summarise(samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """For each figure: the median of each candidate, and dense over packed paired by round."""
    figures = list(samples[DENSE][0])
    report: dict[str, Any] = {}
    for figure in figures:
        values = {name: [sample[figure] for sample in found] for name, found in samples.items()}
        report[figure] = {
            "median": {name: statistics.median(found) for name, found in values.items()},
            "best": {name: min(found) for name, found in values.items()},
            "dense_over": {name: paired_ratio(values[DENSE], found) for name, found in values.items() if name != DENSE},
        }
    return report


def paired_ratio(dense: Sequence[float], packed: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Geometric mean over rounds of dense over packed, with its 95 % bootstrap interval; two samples make a round.

    The interval is None for fewer than two rounds. Raises ValueError for samples that do not pair, CrepeError where
    noise was larger than what was measured.
    """
    if len(dense) != len(packed) or len(dense) % 2 or not dense:
        raise ValueError(f"{len(dense)} dense and {len(packed)} packed samples do not pair in rounds of two")
    sums = [np.asarray(values, dtype=np.float64).reshape(-1, 2).sum(1) for values in (dense, packed)]
    if min(float(found.min()) for found in sums) <= 0:
        raise CrepeError("a decode step came out at no time at all: raise --steps, or wait for a quieter machine")
    logs = np.log(sums[0]) - np.log(sums[1])
    low = high = None
    if len(logs) > 1:
        draws = np.random.default_rng(seed).integers(len(logs), size=(RESAMPLES, len(logs)))
        low, high = (float(value) for value in np.exp(np.quantile(logs[draws].mean(1), (0.025, 0.975))))
    rounds = [float(value) for value in np.exp(logs)]
    return {"ratio": float(np.exp(logs.mean())), "low": low, "high": high, "rounds": rounds}


def step_bytes(folder: Path) -> int:
    """Bytes of weights that one decode step at batch 1 reads: all but the input embedding, of which it reads a row."""
    reader = CheckpointReader(folder)
    sizes = {info.name: info.size_bytes for info in reader}
    has_head = "lm_head.weight" in sizes
    return sum(size for name, size in sizes.items() if not (has_head and name.endswith("embed_tokens.weight")))


def build_llama_1b(root: Path, patterns: Sequence[str]) -> dict[str, Path]:
    """Folders of the dense and the packed candidates below `root`; what is there already is kept."""
    from ..export.pipeline import export_checkpoint
    from ..pattern import parse_pattern
    from ..prune import PruneConfig, prune
    from ..sources import resolve_model
    from .pruning import make_llama_1b

    model = root / "model"
    folders: dict[str, Path] = {}
    for pattern in patterns:
        slug = pattern.replace(":", "of")
        pruned, packed = root / f"dense-{slug}", root / f"packed-{slug}"
        if not packed.is_dir():
            if not (model / "config.json").is_file():
                model.mkdir(parents=True, exist_ok=True)
                make_llama_1b(model)
            if not pruned.is_dir():
                prune(resolve_model(str(model)), pruned, PruneConfig("magnitude", parse_pattern(pattern)), None)
            export_checkpoint(pruned, packed, "packed")
        folders.setdefault(DENSE, pruned)
        folders[pattern] = packed
    return folders


@contextlib.contextmanager
def candidates(options: argparse.Namespace) -> Iterator[dict[str, Path]]:
    """The folders to compare, by name; made for `llama-1b`, in a temporary folder unless one is given."""
    if options.model == ["llama-1b"]:
        with tempfile.TemporaryDirectory() as scratch:
            yield build_llama_1b(options.folder or Path(scratch), options.patterns.split(","))
    elif len(options.model) < 2:
        raise CrepeError("--model takes llama-1b, or a dense folder and one or more packed ones")
    else:
        dense, *packed = (Path(folder) for folder in options.model)
        yield {DENSE: dense, **{str(load_manifest(folder).config["pattern"]): folder for folder in packed}}


def child_settings(threads: int) -> dict[str, str]:
    """Environment of a candidate: vLLM in one process, nothing bound to a core, a key-value cache of 1 GiB."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def measure(folders: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Start every candidate, one after the other, measure them interleaved, and report."""
    longest = max(PREFILL_TOKENS, PROMPT_TOKENS + options.steps) + 32
    context = int(read_json(folders[DENSE] / "config.json")["max_position_embeddings"])
    if longest > context:
        raise CrepeError(f"the model's context of {context} tokens is too short: this needs {longest}")
    work = Work(int(read_json(folders[DENSE] / "config.json")["vocab_size"]), options.steps)
    load = [os.getloadavg()[0]]
    with contextlib.ExitStack() as stack:
        children: dict[str, Child] = {}
        for name, folder in folders.items():
            print(f"loading {name}: {folder}", file=sys.stderr, flush=True)
            # -P: a stale *.egg-info in the working folder must not hide the installed plugin from vLLM.
            command = [sys.executable, "-P", "-m", "crepe_deploy.bench.decode_child", options.engine, str(folder)]
            command += ["--max-tokens", str(longest), *(["--compiled"] if options.compiled else [])]
            children[name] = Child(command, child_settings(options.threads))
            stack.callback(children[name].close)
        samples = interleave(children, work, options.rounds)
        loaded = {name: child.ready | {"rss_after_bytes": child.last["rss_bytes"]} for name, child in children.items()}
    read = {name: step_bytes(folder) for name, folder in folders.items()}
    return {
        "environment": environment() | versions() | engine_versions() | {"threads": options.threads},
        "conditions": conditions(options, [*load, os.getloadavg()[0]]),
        "figures": summarise(samples),
        "linear_bytes_over_dense": {
            name: found["linear_bytes"] / loaded[DENSE]["linear_bytes"] for name, found in loaded.items()
        },
        "step_bytes": read,
        "bytes_bound": {name: read[DENSE] / size for name, size in read.items() if name != DENSE},
        "loaded": loaded,
        "samples": samples,
    }


def engine_versions() -> dict[str, str]:
    """Version of vLLM under whichever name it is installed."""
    import importlib.metadata

    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return {name: importlib.metadata.version(name)}
    return {}


def conditions(options: argparse.Namespace, load: list[float]) -> dict[str, Any]:
    """How the numbers were taken."""
    return {
        "engine": options.engine,
        "model": "random weights, Llama-3.2-1B shape" if options.model == ["llama-1b"] else "given folders",
        "eager": not options.compiled,
        "rounds": options.rounds,
        "steps": options.steps,
        "prompt_tokens": PROMPT_TOKENS,
        "prefill_tokens": PREFILL_TOKENS,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "ratio": "geometric mean over rounds of dense over packed; low, high: 95 % bootstrap interval over rounds",
        "load_average_before_and_after": load,
    }


def print_table(report: dict[str, Any]) -> None:
    """One line for each candidate and figure."""
    print(f"{'figure':<16}{'candidate':<12}{'median ms':>10}{'best ms':>10}   dense over it [95 %]")
    for figure, found in report["figures"].items():
        for name, median in found["median"].items():
            line = f"{figure.removesuffix('_s'):<16}{name:<12}{1e3 * median:>10.2f}{1e3 * found['best'][name]:>10.2f}"
            if name in found["dense_over"]:
                ratio = found["dense_over"][name]
                line += f"   {ratio['ratio']:.3f}"
                line += "" if ratio["low"] is None else f" [{ratio['low']:.3f}, {ratio['high']:.3f}]"
            print(line)
    for name, bound in report["bytes_bound"].items():
        held, loaded = report["linear_bytes_over_dense"][name], report["loaded"]
        print(
            f"{name}: bound by bytes read {bound:.3f}; linear layers {held:.4f} of dense; resident "
            f"{loaded[name]['rss_bytes'] / 1e6:.0f} MB, dense {loaded[DENSE]['rss_bytes'] / 1e6:.0f} MB; "
            f"load {loaded[name]['load_s']:.1f} s, dense {loaded[DENSE]['load_s']:.1f} s"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the measurement and print its table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crepe_deploy.bench.decode", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--model", nargs="+", default=["llama-1b"], help="llama-1b, or folders: DENSE PACKED ...")
    parser.add_argument("--patterns", default="2:4,16:32", help="of llama-1b (%(default)s)")
    parser.add_argument("--folder", type=Path, help="build llama-1b here and keep it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16, help="decode steps in one timing (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--compiled", action="store_true", help="vLLM with torch.compile; eager without")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args(arguments)
    try:
        with candidates(options) as folders:
            report = {"command": f"python -m crepe_deploy.bench.decode {flags(options)}", **measure(folders, options)}
    except CrepeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    print_table(report)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def flags(options: argparse.Namespace) -> str:
    """The options that decide the numbers, as one would type them."""
    shown = ("engine", "patterns", "rounds", "steps", "threads")
    text = " ".join(f"--{name} {getattr(options, name)}" for name in shown)
    return text + (" --compiled" if options.compiled else "")


if __name__ == "__main__":
    sys.exit(main())
