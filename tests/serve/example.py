"""The client in docs/serving.md, run as it stands there against any server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.serve.processes import HANG_S

DOCS = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


def run_example(url: str, prompt: str, key: str) -> str:
    """What it prints, asked for this prompt of the server at `url`."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    for old, new in (("http://127.0.0.1:8000", url), ("The capital of France is", prompt)):
        assert code.count(old) == 1
        code = code.replace(old, new)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True, text=True, timeout=HANG_S, check=False, env=os.environ | {"VLLM_API_KEY": key},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
