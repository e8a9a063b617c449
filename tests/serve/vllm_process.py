"""vLLM in processes of their own: what a test asks of it, asked together where one start can serve several tests."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

JOBS = Path(__file__).with_name("vllm_jobs.py")
PROMPTS = [[2 + index, 5, 9, 30 + index, 7] for index in range(4)]
WITHOUT_US = {"VLLM_PLUGINS": "lora_filesystem_resolver"}
HANG_S = 3600  # ends a process that hangs; a busy machine is no failure
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run this Python, without the working folder on its path."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | variables
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        capture_output=True, text=True, env=environment, timeout=HANG_S, check=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """What the jobs of one process answered, by name, and what it said on stderr."""

    values: dict[str, Any]
    stderr: str

    def __getitem__(self, name: str) -> Any:
        assert name in self.values, self.stderr[-4000:]
        return self.values[name]


def ask_vllm(jobs: Sequence[dict[str, Any]], **variables: str) -> Answers:
    """Run `vllm_jobs.py` on these jobs. With one rank the engine runs in that process too, which saves a start."""
    one = all(job.get("tensor_parallel", 1) == 1 for job in jobs)
    done = python(str(JOBS), json.dumps(jobs), VLLM_ENABLE_V1_MULTIPROCESSING=str(int(not one)), **variables)
    results = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return Answers({result["name"]: result["value"] for result in map(json.loads, results)}, done.stderr)


def generation(name: str, folder: Path, count: int = 24, **options: Any) -> dict[str, Any]:
    """The job that continues PROMPTS."""
    return {"name": name, "generate": str(folder), "prompts": PROMPTS, "count": count, **options}


def transformers_tokens(folder: Path, count: int = 24) -> list[list[int]]:
    """Greedy tokens of the dense folder after PROMPTS, end-of-text included, without a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(PROMPTS)
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    tokens: list[list[int]] = ids[:, len(PROMPTS[0]) :].tolist()
    return tokens
