"""Measure everything on a GPU, resumably: `python bench/gpu/run.py --out FILE.json`; `--rehearse` runs it on a CPU.

Needs torch, triton, transformers and nothing installed of this project: run from a checkout it finds the package.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path


def from_checkout() -> None:
    """Let `crepe_deploy.bench` be this checkout's folder when the package is not installed."""
    root = Path(__file__).resolve().parents[2]
    if importlib.util.find_spec("crepe_deploy") is None:
        sys.path.insert(0, str(root))
    if importlib.util.find_spec("crepe_deploy.bench") is None:
        folder = root / "bench"
        spec = importlib.util.spec_from_file_location(
            "crepe_deploy.bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["crepe_deploy.bench"] = module
        spec.loader.exec_module(module)


def run() -> int:
    """Set up imports, then do what the command line asks; returns the exit code."""
    if "--rehearse" in sys.argv:  # the interpreter is asked for before the kernels are imported
        os.environ["TRITON_INTERPRET"] = "1"
    from_checkout()
    from crepe_deploy.bench.gpu.command import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
