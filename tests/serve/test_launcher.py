"""The launcher against a stand-in server: readiness, the smoke check, every way to fail, and clean ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from crepe_deploy.exporting.frame.greedy import GREEDY_TOKENS
from crepe_deploy.serve import process as processes
from crepe_deploy.serve.command import serve_command, usage
from crepe_deploy.serve.launcher import ServeOptions, check, free_port, recorded_greedy, run, served_dtype, vllm_command
from crepe_deploy.serve.smoke import compare, healthy, request

from crepe_deploy.errors import CheckpointError, ConfigError, ServeError
from crepe_deploy.store.manifest import Manifest, Source, save_manifest
from tests.pico import make_pico_llama
from tests.serve.example import run_example
from tests.serve.processes import below, wait_until_gone

FAKE = Path(__file__).with_name("fake_server.py")
GREEDY: dict[str, Any] = {
    "prompt_token_ids": [1, 2],
    "token_ids": [5, 6, 7, 8],
    "margins": [2.0, 3.0, 0.2, 1.0],
    "checkpoint_dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def _logs_with_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_a_server_that_takes_long_says_how_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "NEWS_S", 0.0)
    said: list[str] = []
    server = processes.Server(
        [sys.executable, "-c", "import time; print('loading\\x1b[31m ' + 'w' * 200, flush=True); time.sleep(3600)"],
        os.environ,
    )

    def say(line: str) -> None:
        said.append(line)
        server.stopping = "www" in line

    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with server.stopped_at_exit():
        assert not server.wait_until_healthy(url, 3600, say)
    assert re.match(r"not ready after \d+ s of at most 3600 s; its log says: loading\[31m www", said[-1])
    assert said[-1].endswith("w...") and len(said[-1]) < 200


def start(mode: str, folder: Path, *, greedy: dict[str, Any] | None = GREEDY, **options: Any) -> dict[str, Any]:
    """Run the launcher on the fake server; SIGTERM ourselves when it is ready. Returns what it reported."""
    found: dict[str, Any] = {"said": []}
    port = free_port("127.0.0.1")

    def ready(server: dict[str, Any]) -> None:
        found.update(server)
        os.kill(os.getpid(), found.get("signal", signal.SIGTERM)) if mode != "quits" else None

    chosen = ServeOptions(folder, start_timeout_s=options.pop("start_timeout_s", 600), **options)
    run([sys.executable, str(FAKE), str(port), mode], chosen, port, greedy, found["said"].append, ready)
    assert not healthy(f"http://127.0.0.1:{port}")
    return found


def test_ready_after_an_equal_answer_and_a_clean_end(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = start("good", tmp_path)
    assert found["smoke"] == {"agreed": 4, "total": 4, "dtype": "bfloat16", "ties": ()}
    assert found["model"] == "fake" and "4 of 4 greedy tokens agree" in found["said"][-1]
    assert not Path(found["log"]).exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_key_reaches_the_server_but_not_its_command_line(tmp_path: Path) -> None:
    assert start("good", tmp_path, api_key="secret")["smoke"]["agreed"] == 4
    command = vllm_command(ServeOptions(tmp_path, api_key="secret"), 8000, GREEDY)
    assert "secret" not in " ".join(command)


def test_without_a_recorded_prompt_it_says_so(tmp_path: Path) -> None:
    found = start("good", tmp_path, greedy=None)
    assert found["smoke"] is None and "not checked" in found["said"][-1]


@pytest.mark.parametrize(
    ("mode", "match"),
    [
        ("dies", "ended with code 1 before it was ready(.|\n)*no room for the model"),
        ("never", "not ready after 1 s(.|\n)*fake server, mode never"),
        ("wrong", "token 2 of the recorded prompt differs"),
        ("quits", "ended by itself with code 7"),
    ],
)
def test_failures_end_with_the_cause(tmp_path: Path, mode: str, match: str) -> None:
    with pytest.raises(ServeError, match=match):
        start(mode, tmp_path, start_timeout_s=1 if mode == "never" else 600)


def test_a_server_that_ignores_signals_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_TIMEOUT_S", 0.5)
    assert start("stubborn", tmp_path)["smoke"]["agreed"] == 4


def test_a_signal_while_starting_stops_quietly(tmp_path: Path) -> None:
    timer = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    found = start("never", tmp_path)
    timer.join()
    assert "smoke" not in found


def answers(*tokens: int) -> Callable[[Sequence[int], int], Sequence[int]]:
    """A server that says `tokens` to the recorded prompt, and what is recorded once it is set right."""
    return lambda prompt, count: tokens if len(prompt) == 2 else [5, 6, 7, 8][len(prompt) - 2 :]


def test_rounding_ties_are_told_apart_from_wrong_answers() -> None:
    tie = compare(GREEDY, "bfloat16", answers(5, 6, 9, 9))
    assert (tie.agreed, tie.total, tie.ties) == (3, 4, (0.2,))
    assert str(tie).endswith("1 fell to rounding, where the two best logits were 0.2 apart")
    with pytest.raises(ServeError, match="leads by 3"):
        compare(GREEDY, "bfloat16", answers(5, 9, 7, 8))
    with pytest.raises(ServeError, match="token 3"):
        compare(GREEDY, "float32", answers(5, 6, 9, 9))
    with pytest.raises(ServeError, match="token 3"):
        compare(GREEDY, "bfloat16", answers(5, 6))  # too short an answer is no tie
    with pytest.raises(ServeError, match="token 4"):  # after a tie, the rest is compared too
        compare(GREEDY, "bfloat16", lambda prompt, _: [5, 6, 9, 9] if len(prompt) == 2 else [1])


def test_other_hosts_need_a_key(tmp_path: Path) -> None:
    folder = make_pico_llama(tmp_path / "model")
    for host in ("0.0.0.0", "192.168.0.7", "example.org", "::"):
        with pytest.raises(ConfigError, match="--api-key"):
            check(ServeOptions(folder, host=host))
    check(ServeOptions(folder, host="0.0.0.0", port=0, api_key="secret"))
    for key in ("", "two words", "k\u00e9y", "line\n"):
        with pytest.raises(ConfigError, match="--api-key"):
            check(ServeOptions(folder, host="0.0.0.0", port=0, api_key=key))
    for host in ("no such host", "a" * 70, "x:y"):
        with pytest.raises(ConfigError, match="cannot be served on"):
            check(ServeOptions(folder, host=host, port=0, api_key="secret"))
    for host in ("127.0.0.1", "localhost"):
        check(ServeOptions(folder, host=host, port=0))


def test_what_is_no_model_or_no_free_port_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        check(ServeOptions(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="cannot be served on"):
            check(ServeOptions(tmp_path, port=taken.getsockname()[1]))


@pytest.mark.parametrize(
    "greedy",
    [
        [], {}, {**GREEDY, "margins": [1.0]}, {**GREEDY, "token_ids": "5678"}, {**GREEDY, "prompt_token_ids": []},
        {**GREEDY, "token_ids": [5, 6, 7, None]}, {**GREEDY, "checkpoint_dtype": "--trust-remote-code"},
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_compared_is_refused(tmp_path: Path, greedy: Any) -> None:
    source = Source(kind="folder", id="x", files={})
    manifest = Manifest(
        stage="pruned", format="dense", versions={}, source=source, config={}, metrics={"greedy": GREEDY}
    )
    save_manifest(tmp_path, manifest)
    assert recorded_greedy(tmp_path) == GREEDY
    save_manifest(tmp_path, manifest.model_copy(update={"metrics": {"greedy": greedy}}))
    with pytest.raises(CheckpointError, match="greedy prompt is incomplete"):
        recorded_greedy(tmp_path)


def test_the_users_options_win(tmp_path: Path) -> None:
    plain = vllm_command(ServeOptions(tmp_path), 8000, GREEDY)
    assert plain[plain.index("--dtype") + 1] == "bfloat16" and f"--served-model-name={tmp_path.name}" in plain
    options = ServeOptions(tmp_path, extra=("--dtype=float32", "--served-model-name", "mine"))
    command = vllm_command(options, 8000, GREEDY)
    assert command.count("--served-model-name") == 1 and "--dtype" not in command
    assert served_dtype(options, GREEDY) == "float32" and served_dtype(ServeOptions(tmp_path), GREEDY) == "bfloat16"


def test_the_command_passes_unknown_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServeOptions] = []
    monkeypatch.setattr("crepe_deploy.serve.launcher.serve", lambda options, say, ready: seen.append(options))
    arguments = [str(tmp_path), "--port", "9", "--enforce-eager", "--max-model-len", "64"]
    result = CliRunner().invoke(serve_command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert seen[0].port == 9 and seen[0].extra == ("--enforce-eager", "--max-model-len", "64")
    CliRunner().invoke(serve_command, [str(tmp_path), "--", "--port", "9"], catch_exceptions=False)
    assert seen[1].port == 8000 and seen[1].extra == ("--port", "9")


def test_usage_shows_curl_and_python() -> None:
    server = {"url": "http://127.0.0.1:8000", "model": "packed"}
    text = usage(server, has_key=False)
    assert "curl http://127.0.0.1:8000/v1/completions" in text and "OpenAI(base_url=" in text
    assert "VLLM_API_KEY" in usage(server, has_key=True)


def test_defining_the_command_imports_nothing_heavy() -> None:
    code = "import sys, crepe_deploy.serve.command; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.vllm
def test_vllm_serves_a_packed_model_and_does_not_outlive_the_command(tmp_path: Path) -> None:
    import torch

    from tests.serve.models import exports

    packed = exports(tmp_path, "16:32", torch.float32)["packed"]
    code = "from crepe_deploy.serve.command import serve_command; serve_command()"
    python = [sys.executable, "-P", "-c", code]
    options = ["--port", "0", "--json", "--api-key", "secret", "--enforce-eager", "--max-model-len", "256"]
    process = subprocess.Popen(
        [*python, str(packed), *options, "--max-num-seqs", "4"], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout is not None
    try:
        server = json.loads(process.stdout.readline())
        assert server["smoke"]["agreed"] == server["smoke"]["total"] == GREEDY_TOKENS
        body = {"model": server["model"], "prompt": "the city of the world", "max_tokens": 16, "temperature": 0}
        for path in ("/v1/completions", "/invocations"):
            with pytest.raises(ServeError, match="answered 401"):
                request(f"{server['url']}{path}", body, None)
        text = request(f"{server['url']}/v1/completions", body, "secret")["choices"][0]["text"]
        assert run_example(server["url"], body["prompt"], "secret").startswith(text)
        all_of_it = below(process.pid)
        assert len(all_of_it) >= 3  # the keeper, the API server, the engine
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    wait_until_gone(all_of_it)
