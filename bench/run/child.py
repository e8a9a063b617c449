"""One candidate in a process of its own: `python -m crepe_deploy.bench.run.child ENGINE FOLDER SETTINGS`.

One JSON object a line. The first line out says what was loaded. Each line in, `{"prompts": [[token ids]],
"tokens": n}`, is answered by `{"times": seconds from the request's start to each token}`, or by `{"error": why}`;
`{}` is answered with the memory used so far. The end of the input ends the process. Whatever libraries print goes to
stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from ...machine import peak_rss_bytes
from ...serve.engines import get_engine
from ...serve.engines.base import Engine, Settings


def answer(engine: Engine, requests: Iterable[str], out: TextIO) -> None:
    """Describe the loaded engine, then time what is asked for."""
    _say(out, {"loaded_bytes": resident_bytes(), **engine.describe()})
    for line in requests:
        request = json.loads(line)
        if request:
            _say(out, timed(engine, request["prompts"], request["tokens"]))
        else:
            _say(out, {"peak_bytes": peak_bytes()})


def timed(engine: Engine, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Seconds to each token, or why the engine failed."""
    start = time.perf_counter()
    try:
        times = engine.generate(prompts, tokens)
    except (RuntimeError, ValueError, MemoryError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"times": [token - start for token in times]}


def resident_bytes() -> int:
    """What this process has in memory now; on a GPU, what is allocated there."""
    cuda = _cuda()
    if cuda is not None:
        return int(cuda.memory_allocated())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most this process has had in memory; on a GPU, the most that was allocated there."""
    cuda = _cuda()
    return peak_rss_bytes() if cuda is None else int(cuda.max_memory_allocated())


def _cuda() -> Any:
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def _say(out: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=out, flush=True)


def main(arguments: list[str]) -> None:
    """Load the engine and answer until the input ends."""
    name, folder, settings = arguments
    real = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(real, "w") as out:
        engine = get_engine(name)(Path(folder), Settings(**json.loads(settings)))
        answer(engine, sys.stdin, out)
        engine.close()


if __name__ == "__main__":
    main(sys.argv[1:])
