"""The candidates' processes, seen from outside: each takes its turns and says what it holds."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from ...errors import CrepeError
from ...serve.engines.base import Settings
from .result import Point, Request, Visit

STOP_TIMEOUT_S: Final = 10.0
TAIL_LINES: Final = 25
_FIRST_TOKEN: Final = 3  # below are the usual special tokens


@dataclass(frozen=True)
class Turn:
    """What a visit is to do. Equal turns send equal prompts, whichever candidate they go to."""

    point: Point
    round: int
    seed: int
    vocabulary: int

    def prompts(self) -> list[list[list[int]]]:
        """For each request its prompts as token ids, which no cache has seen in another round."""
        generator = random.Random(f"{self.seed}/{self.point.name}/{self.round}")
        return [
            [
                [generator.randrange(_FIRST_TOKEN, self.vocabulary) for _ in range(self.point.prompt_tokens)]
                for _ in range(self.point.batch)
            ]
            for _ in range(self.point.requests)
        ]


class Worker(Protocol):
    """A candidate that is loaded and waits for its turn."""

    name: str
    ready: dict[str, Any]

    def visit(self, turn: Turn) -> Visit:
        """Take one turn. Raises CrepeError naming the candidate when its process ended."""

    def peak_bytes(self) -> int | None:
        """The most memory it has used."""

    def close(self) -> None:
        """End its process, and everything that process started."""


class OfflineWorker:
    """An engine in a child process that sleeps until it is asked; `ready` is what it said about itself,
    with the seconds from its start to there as `load_s`."""

    def __init__(self, name: str, command: Sequence[str], variables: dict[str, str]) -> None:
        self.name = name
        start = time.perf_counter()
        with tempfile.NamedTemporaryFile("wb", prefix="crepe-deploy-bench-", suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **variables}, start_new_session=True,
            )  # fmt: skip
        self.failed = False
        try:
            self.ready = self._read()
            self.ready["load_s"] = time.perf_counter() - start
        except BaseException:
            self.close()
            raise

    def visit(self, turn: Turn) -> Visit:
        """One request after the other, each of `batch` sequences in lock step."""
        start = time.perf_counter()
        requests = [self._request(turn.point, prompts) for prompts in turn.prompts()]
        return Visit(round=turn.round, duration_s=time.perf_counter() - start, requests=requests)

    def peak_bytes(self) -> int | None:
        """The most memory the process has used."""
        return int(self._ask({})["peak_bytes"])

    def close(self) -> None:
        """End the process; its log is kept where it failed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.0 if self.failed else STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        if not self.failed:
            self.log.unlink(missing_ok=True)

    def _request(self, point: Point, prompts: list[list[int]]) -> Request:
        answer = self._ask({"prompts": prompts, "tokens": point.output_tokens})
        shape: dict[str, Any] = {"sequences": len(prompts), "prompt_tokens": point.prompt_tokens}
        if "error" in answer:
            return Request(**shape, output_tokens=0, error=str(answer["error"]))
        times = answer["times"]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        return Request(**shape, output_tokens=len(times), ttft_s=times[0], itl_s=gaps, latency_s=times[-1])

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # reading tells why
            print(json.dumps(message), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.failed = True
            code = self.process.wait()
            raise CrepeError(f"candidate '{self.name}' ended {_how(code)}\n{log_tail(self.log)}")
        message: dict[str, Any] = json.loads(line)
        return message


def offline_command(engine: str, folder: Path, settings: Settings) -> list[str]:
    """The child's command line."""
    # -P: a stale *.egg-info in the working folder must not hide the installed plugin from vLLM.
    child = [sys.executable, "-P", "-m", "crepe_deploy.bench.run.child"]
    return [*child, engine, str(folder), json.dumps(asdict(settings))]


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "by SIGKILL, perhaps because memory ran out: every candidate stays loaded, so try fewer at once"
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def log_tail(log: Path) -> str:
    """The last lines of a log, and where the rest is."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"the end of {log}:", *(f"  {line}" for line in lines[-TAIL_LINES:])])
