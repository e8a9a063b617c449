"""A candidate behind a server of its own: vLLM's API server, loaded by vLLM's own load generator."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...errors import CrepeError, ServeError
from ...serve.engines.base import check_options
from ...serve.launcher import ServeOptions, free_port, recorded_greedy, require_vllm, running, vllm_command
from ...serve.load import SERVER_OPTIONS
from .result import Visit
from .served import served_visit
from .worker import Turn

SERVED: Final = "vllm-serve"
OPTIONS: Final = ("compiled", "server_options")
_PROC: Final = Path("/proc")
_HOST: Final = "127.0.0.1"


def require(options: dict[str, Any]) -> None:
    """Raise MissingExtra or ServeError without a usable vLLM, ConfigError for an unknown option."""
    require_vllm()
    check_options(SERVED, options, OPTIONS)


@dataclass(frozen=True)
class Backend:
    """What a server is started with (its command), told to keep to (sampling), and asked for (one visit): vLLM's."""

    command: Callable[[ServeOptions, int, Any], list[str]] = vllm_command
    sampling: Callable[[Path], Any] = recorded_greedy
    visit: Callable[..., Visit] = served_visit


class ServedWorker:
    """vLLM's server in processes of its own, idle between turns. Options: `compiled` (default false: eager),
    `server_options`: a list of vLLM's own."""

    def __init__(
        self, name: str, folder: Path, extra: list[str], options: dict[str, Any], variables: dict[str, str],
        backend: Backend,
    ) -> None:  # fmt: skip
        self.name, self.folder, self.backend = name, folder, backend
        eager = [] if options.get("compiled", False) else ["--enforce-eager"]
        own = [str(part) for part in options.get("server_options", ())]
        serve = ServeOptions(folder, _HOST, 0, extra=(*SERVER_OPTIONS, *eager, *extra, *own))
        port, greedy = free_port(_HOST), backend.sampling(folder)
        # env(1) sets what is this candidate's alone, and becomes the server.
        prefix = ["env", *(f"{key}={value}" for key, value in variables.items())]
        self._stack = ExitStack()
        try:
            self.server = self._stack.enter_context(
                running([*prefix, *backend.command(serve, port, greedy)], serve, port, greedy, lambda _line: None)
            )
        except ServeError as error:
            raise CrepeError(f"candidate '{name}': {error}") from error
        self.ready: dict[str, Any] = {"load_s": self.server.load_s, "loaded_bytes": self._resident("VmRSS")}

    def visit(self, turn: Turn) -> Visit:
        """The point's requests, `concurrency` of them in flight."""
        digest = hashlib.sha256(f"{turn.seed}/{turn.point.name}/{turn.round}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        try:
            return self.backend.visit(self.server, self.folder, turn.point, seed=seed, round=turn.round)
        except ServeError as error:
            raise CrepeError(f"candidate '{self.name}': {error}") from error

    def peak_bytes(self) -> int | None:
        """The sum of what each of the server's processes held at most."""
        return self._resident("VmHWM")

    def close(self) -> None:
        """Stop the server and everything that it started."""
        self._stack.close()

    def _resident(self, field: str) -> int | None:
        """Sum over the server's processes of a field of their status; None where they cannot be read."""
        sizes = list(session_sizes(self.server.pid, field))
        return sum(sizes) if sizes else None


def session_sizes(session: int, field: str) -> Iterator[int]:
    """Bytes in a memory field of /proc/PID/status, for every process of the session that `session` leads; that one, the
    server's keeper, not counted."""
    for folder in _PROC.glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(encoding="utf-8")
            status = (folder / "status").read_text(encoding="utf-8")
        except OSError:  # it has ended meanwhile
            continue
        if int(stat.rpartition(")")[2].split()[3]) == session != int(folder.name):
            yield from (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))
