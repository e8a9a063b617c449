"""`python -m tests.faults`: throw inputs and faults at the product and write what became of it, as it goes.

Started again with the same --out it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from .strikes import environment

SETTINGS = {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "PYTHONMALLOC": "malloc",  # huge pages: a fork copies fewer entries
}  # fmt: skip


def main() -> int:
    """Run what is asked for; 1 where there was a defect."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=0, help="malformed inputs")
    parser.add_argument(
        "--readers", type=int, default=0, metavar="N", help="malformed inputs for each reader, called alone"
    )
    parser.add_argument("--faults", type=int, default=0, help="file events struck")
    parser.add_argument("--storm", type=float, default=0, metavar="SECONDS", help="servers under load")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kinds", default="", help="of inputs, with commas: only these")
    parser.add_argument("--quick", action="store_true", help="nothing that takes seconds to make: no ONNX")
    parser.add_argument("--only", type=int, nargs="+", metavar="INDEX", help="run these inputs; one is shown and kept")
    parser.add_argument(
        "--out", type=Path, default=Path("out/faults"), help="what was found, in a folder for each seed"
    )
    parser.add_argument("--write", type=Path, default=None, metavar="FILE", help="write the figures as JSON here too")
    parser.add_argument(
        "--table", type=Path, default=None, metavar="FILE", help="put them as Markdown between its marks"
    )
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out / f"seed-{options.seed}-jobs-{options.jobs}"
    if options.worker is None and options.only is None:
        return _direct(options)
    if "LD_PRELOAD" not in os.environ:
        os.execve(sys.executable, [sys.executable, "-m", "tests.faults", *sys.argv[1:]], environment() | SETTINGS)
    from . import worker

    return worker.show(options) if options.only is not None else worker.work(options)


def _direct(options: argparse.Namespace) -> int:
    """Start the workers, and gather what they write until they have ended."""
    from . import figures
    from .table import write_table

    options.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    workers = []
    for number in range(options.jobs):
        command = [sys.executable, "-m", "tests.faults", *sys.argv[1:], "--worker", str(number)]
        with (options.out / f"worker-{number}.log").open("a") as log:
            workers.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment() | SETTINGS))
    codes: list[int] = []
    storm = None
    while len(codes) < len(workers):
        time.sleep(1)
        codes = [code for one in workers if (code := one.poll()) is not None]
        if len(codes) == len(workers) and options.storm:
            command = [sys.executable, "-m", "tests.serve.storm", str(options.storm), str(options.seed)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | SETTINGS)
            (options.out / "storm.log").write_text(done.stdout + done.stderr)
            codes.append(done.returncode)
            storm = None if done.returncode else json.loads(done.stdout)
        if int(time.time() - began) % 60 == 0 or len(codes) >= len(workers):
            summary = figures.gather(options, time.time() - began, storm)
            for place in filter(None, (options.out / "figures.json", options.write)):
                place.write_text(figures.publishable(summary))
    if options.table:
        write_table(options.table, summary)
    print("\n".join(figures.lines(summary)).encode(errors="backslashreplace").decode())
    if any(codes):
        print(f"a part ended with an error, see {options.out}/*.log")
    return int(any(codes) or bool(summary["defects"]))


if __name__ == "__main__":
    sys.exit(main())
