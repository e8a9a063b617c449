"""What a starting server is said to be busy with, by lines that vLLM logs."""

from __future__ import annotations

import pytest
from crepe_deploy.serve.phases import phase, telling

WORKER, ENGINE = "(Worker pid=19) INFO 11-28 20:23:30 ", "(EngineCore pid=17) INFO 11-28 20:23:33 "
# In the order in which they come, with the phase from there on; lines of nothing to say between them change none.
LOG = [
    (ENGINE + "[model.py:733] Resolved architecture: LlamaForCausalLM", "starting the engine"),
    (ENGINE + "[core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='m'", "starting the engine"),
    (WORKER + "[cpu_model_runner.py:68] Starting to load model m...", "loading weights"),
    ("Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]", "loading weights"),
    (WORKER + "[cpu_model_runner.py:87] Warming up model for the compilation...", "compiling"),
    (WORKER + "[backends.py:1105] Using cache directory: /c for vLLM's torch.compile", "compiling"),
    (WORKER + "[backends.py:1167] Dynamo bytecode transform time: 9.10 s", "compiling"),
    (WORKER + "[backends.py:399] Compiling a graph for compile range (1, 2048) takes 33.00 s", "compiling"),
    (ENGINE + "[kv_cache_utils.py:2327] CPU KV cache size: 3,145,728 tokens", "warming up"),
    (WORKER + "[cpu_model_runner.py:91] Warming up done.", "warming up"),
    ("INFO:     Started server process [1557]", "opening its address"),
]
ALARMING = [
    ENGINE.replace("INFO", "WARNING") + "[vllm.py:725] Model Runner V2 requires Triton; using V1 instead.",
    ENGINE + "[shm_broadcast.py:109] No available shared memory broadcast block found in 60 seconds.",
    "Triton is installed, but doesn't include CPU backend. Disabling Triton.",
    WORKER + "[vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup.",
    "  warnings.warn(",
    "(APIServer pid=1557) ",
    "",
]


@pytest.mark.parametrize("count", range(1, len(LOG) + 1))
def test_the_phase_is_that_of_the_newest_line_that_shows_one(count: int) -> None:
    lines = [line for line, _ in LOG[:count]]
    assert phase([*lines, *ALARMING]) == LOG[count - 1][1]


@pytest.mark.parametrize("line", ALARMING)
def test_what_harms_nothing_is_no_phase_and_is_not_quoted(line: str) -> None:
    assert phase([line]) is None
    assert telling(["reading", line]) == ["reading"]
