"""Whether the gate tells a slow-down of 15 % from none on this machine: `python -m crepe_deploy.bench.studies.detect`.

Each trial measures two arms interleaved, in one process, and lets the gate decide with more rounds up to a cap. Both
arms do the same real work: 20 calls of a packed kernel, or one decode step of a tiny model. In an A/A trial they do
equally much and must PASS; in a planted one the second arm makes 23 calls, or stays busy for 15 % of the time that its
step just took, and must FAIL.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from ...errors import CrepeError
from ...progress import progress
from ...store.files import write_text
from ..gate.arms import COMMITS
from ..gate.budgets import TIME, slowdown_budgets
from ..gate.checks import Pair
from ..gate.interleave import Interleaved, Work, lingering, repeated
from ..gate.judge import judge
from ..gate.looks import decide
from ..gate.verdict import Verdict
from .kernels import environment
from .workloads import decode_step, packed_linear

CLOCKS: Final = {"wall": time.perf_counter, "cpu": time.thread_time}
PLANTED: Final = 0.15
CALLS: Final = 20
MORE_CALLS: Final = 23


def kernel_pair(planted: bool) -> dict[str, Work]:
    """Calls of a packed kernel, and as many or 15 % more."""
    work = packed_linear(1, "stream", (512, 1024))
    return {"base": repeated(work, CALLS), "new": repeated(work, MORE_CALLS if planted else CALLS)}


def decode_pair(planted: bool) -> dict[str, Work]:
    """A decode step, and the same or one that stays busy for 15 % longer."""
    step = decode_step(hidden=64, layers=1)
    return {"base": step, "new": lingering(step, PLANTED) if planted else step}


PAIRS: Final[dict[str, Callable[[bool], dict[str, Work]]]] = {
    "packed kernel, batch 1": kernel_pair,
    "decode step": decode_pair,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the trials and print their counts; 0 where at least 95 % of each kind end as they should."""
    parser = argparse.ArgumentParser(
        prog="python -m crepe_deploy.bench.studies.detect", description="Try the gate out."
    )
    parser.add_argument("--trials", type=int, default=20, help="of each kind and work (%(default)s)")
    parser.add_argument("--rounds", type=int, default=8, help="before the first look (%(default)s)")
    parser.add_argument("--max-rounds", type=int, default=128, help="the cap (%(default)s)")
    parser.add_argument("--max-slowdown", type=float, default=0.05, help="the budget (%(default)s)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="or processor time (%(default)s)")
    parser.add_argument("--only", choices=list(PAIRS), help="one work alone")
    parser.add_argument("--out", type=Path, help="write every trial here as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        report = measure(options)
        if options.out is not None:
            write_text(options.out, json.dumps(report, indent=1) + "\n")
    except CrepeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for row in report["counts"]:
        print(f"{row['work']}: {row['kind']}: {row['right']} of {row['trials']} {row['wanted']}, {row['statuses']}")
    return 0 if all(row["right"] >= 0.95 * row["trials"] for row in report["counts"]) else 1


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every trial, its counts and its conditions. Kinds take turns, so that both meet the same neighbours."""
    start, load = time.monotonic(), os.getloadavg()[0]
    chosen = [name for name in PAIRS if options.only in (None, name)]
    plan = [(name, planted) for _ in range(options.trials) for name in chosen for planted in (False, True)]
    trials = []
    with progress("trials") as step:
        for index, (name, planted) in enumerate(plan):
            trials.append({"work": name, "planted": planted} | trial(name, planted, options))
            step(index + 1, len(plan))
    return {
        "command": f"python -m crepe_deploy.bench.studies.detect --trials {options.trials} --rounds {options.rounds} "
        f"--max-rounds {options.max_rounds} --max-slowdown {options.max_slowdown} --clock {options.clock}",
        "environment": environment(),
        "conditions": {
            "threads": 1,
            "clock": options.clock,
            "load_average_before_and_after": [load, os.getloadavg()[0]],
            "seconds": round(time.monotonic() - start, 1),
        },
        "counts": counts(trials),
        "trials": trials,
    }


def trial(name: str, planted: bool, options: argparse.Namespace) -> dict[str, Any]:
    """One decision: what it was, after how many rounds, and the slow-down it saw."""
    verdict, rounds = judge_pair(PAIRS[name](planted), name, options)
    value = verdict.rows[0].value
    assert value is not None
    return {"status": verdict.status, "rounds": rounds, "ratio": value.value, "low": value.low, "high": value.high}


def judge_pair(works: dict[str, Work], point: str, options: argparse.Namespace) -> tuple[Verdict, int]:
    """Measure a pair of works, first the baseline, until the gate decides or the cap is met; and the rounds used."""
    measured = Interleaved(works, clock=CLOCKS[options.clock])
    measured.warm_up()
    budgets = slowdown_budgets(options.max_slowdown, (TIME,))
    base, new = works

    def more(count: int) -> Pair:
        measured.more(count)
        return measured.arm(base, point), measured.arm(new, point)

    verdict = decide(
        more, lambda pair, looks: judge([pair], budgets, COMMITS, looks=looks), options.rounds, options.max_rounds
    )
    return verdict, len(measured.rounds[new])


def counts(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How often each kind of trial ended as it should."""
    rows = []
    for work in dict.fromkeys(trial["work"] for trial in trials):
        for planted, wanted in ((False, "PASS"), (True, "FAIL")):
            ended = [trial["status"] for trial in trials if (trial["work"], trial["planted"]) == (work, planted)]
            statuses = {status: ended.count(status) for status in sorted(set(ended))}
            kind = f"planted {PLANTED:.0%}" if planted else "A/A"
            rows.append(
                {"work": work, "kind": kind, "wanted": wanted, "trials": len(ended), "right": ended.count(wanted),
                 "statuses": statuses}
            )  # fmt: skip
    return rows


if __name__ == "__main__":
    sys.exit(main())
