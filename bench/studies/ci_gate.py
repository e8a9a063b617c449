"""The gate of this repository's own CI: packed kernels beside dense ones, against a committed baseline.

    python -m crepe_deploy.bench.studies.ci_gate [--update]

Only the ratios of packed to dense within a run are compared, so another machine will do; the kernels are those of the
float32 path, whose ratio depends least on the instruction set. PASS and INCONCLUSIVE end with 0. JUnit XML, a Markdown
comment and the measurement itself go to out/gate/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from ...errors import CrepeError, GateInconclusive
from ...store.files import write_text
from ..gate import render
from ..gate.budgets import slowdown_budgets
from ..gate.gates import Options, gate_files, raise_for
from ..gate.pytest_json import CONTROL

TESTS: Final = Path("bench/studies/test_latency.py")
BASELINE: Final = Path("bench/baselines/ci.json")
OUT: Final = Path("out/gate")
SELECTED: Final = "beside_dense and float32"
MAX_SLOWDOWN: Final = 0.5  # two machines' caches and vector units differ; a lost kernel costs more than this


def main(arguments: list[str] | None = None) -> int:
    """Measure and judge; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m crepe_deploy.bench.studies.ci_gate", description="Gate this repository."
    )
    parser.add_argument("--update", action="store_true", help=f"replace {BASELINE} by a new measurement")
    parser.add_argument("--max-slowdown", type=float, default=MAX_SLOWDOWN, help="(%(default)s)")
    options = parser.parse_args(arguments)
    try:
        measured = measure(OUT / "new.json")
        if options.update:
            write_text(BASELINE, json.dumps(kept(json.loads(measured.read_text(encoding="utf-8"))), indent=1) + "\n")
            return 0
        budgets = slowdown_budgets(options.max_slowdown, ("time_s",))
        verdict = gate_files(BASELINE, measured, budgets, Options(host_mismatch="ratios"))
        render.write(verdict, OUT / "junit.xml", OUT / "comment.md")
        render.show(verdict, as_json=False)
        raise_for(verdict)
    except GateInconclusive as error:
        print(f"{error}; not a failure here")
    except CrepeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(out: Path) -> Path:
    """Run the selected benchmarks in a process of their own. Raises CrepeError where they fail."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", str(TESTS), "-q", "-k", SELECTED, "--benchmark-only"]
    command += ["--benchmark-disable-gc", f"--benchmark-json={out}", "--benchmark-columns=median,rounds"]
    if subprocess.run(command, check=False).returncode or not out.is_file():
        raise CrepeError(f"the benchmarks did not run: {' '.join(command)}")
    return out


def kept(document: dict[str, Any]) -> dict[str, Any]:
    """What the gate reads of pytest-benchmark's JSON: nothing about whose machine it was."""
    machine = document["machine_info"]
    cpu = {name: machine["cpu"].get(name) for name in ("brand_raw", "count")}
    return {
        "machine_info": {"cpu": cpu, "machine": machine["machine"], "python_version": machine["python_version"]},
        "benchmarks": [
            {
                "fullname": entry["fullname"],
                "extra_info": {CONTROL: [round(value, 7) for value in entry["extra_info"][CONTROL]]},
                "stats": {"data": [round(value, 7) for value in entry["stats"]["data"]]},
            }
            for entry in document["benchmarks"]
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
