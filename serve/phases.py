"""What a starting server is busy with, in plain words, by the lines of its log; none of vLLM's own warnings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

# The newest line that one of them is found in says the phase.
PHASES: Final = {
    "starting the engine": r"Resolved architecture|Initializing a V1 LLM engine",
    "loading weights": r"Starting to load model|Loading \S+ checkpoint shards|Loading weights took|Model loading took",
    "compiling": r"Warming up model for the compilation|Dynamo bytecode transform|Compiling a graph|"
    r"(Cache|load) the (compiled )?graph|for vLLM's torch\.compile",
    "warming up": r"KV cache size|[Ww]armup run took|Warming up (?!model for)|Capturing CUDA graphs|Graph capturing|"
    r"init engine \(",
    "opening its address": r"Starting vLLM server|Started server process|Application startup complete",
}
# What vLLM and its libraries log of every machine or of a slow one; nothing is wrong.
HARMLESS: Final = re.compile(
    r"No available shared memory broadcast block|requires Triton|Triton is (not )?installed|\w+Warning: |"
    r"warnings\.warn|not found in LD_PRELOAD|ulimit|NUMA binding|Enforce eager set|Inductor compilation was disabled|"
    r"Reset SSM cache|^\s*(\(\S+ pid=\d+\)\s*)?$"
)


def phase(lines: Sequence[str]) -> str | None:
    """The phase that the newest lines of a log show; None where no line shows one."""
    for line in reversed(lines):
        for name, words in PHASES.items():
            if re.search(words, line):
                return name
    return None


def telling(lines: Sequence[str]) -> list[str]:
    """The lines without those that say nothing of how the start goes."""
    return [line for line in lines if not HARMLESS.search(line)]
