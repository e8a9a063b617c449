"""Served load: vLLM's own generator against a server that fails in every way, and against a real vLLM."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from crepe_deploy.bench.run.metrics import METRICS, errors, succeeded
from crepe_deploy.bench.run.result import Point, Series
from crepe_deploy.bench.run.served import served_visit, visit_of
from crepe_deploy.serve.launcher import Running, ServeOptions, free_port, running, serving
from crepe_deploy.serve.load import SERVER_OPTIONS, Load, drive, read_result, run_generator
from crepe_deploy.serve.smoke import healthy

from crepe_deploy.errors import ConfigError, ServeError
from tests.pico import pico_tokenizer
from tests.serve.fake_server import TOKEN_S
from tests.serve.models import exports

FAKE = Path(__file__).with_name("fake_server.py")
LOAD = Load(prompt_tokens=8, output_tokens=4, requests=3, concurrency=2)
POINT = Point(name="load", prompt_tokens=8, output_tokens=6, concurrency=3, requests=8)
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(autouse=True)
def _files_with_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def fake(mode: str, folder: Path, said: list[str] | None = None) -> Any:
    """The fake server as a context."""
    port = free_port("127.0.0.1")
    command = [sys.executable, str(FAKE), str(port), mode]
    options = ServeOptions(folder, start_timeout_s=600)
    return running(command, options, port, None, (said if said is not None else []).append)


def result(**changes: Any) -> dict[str, Any]:
    """A result as `vllm bench serve` 0.32 writes it, of LOAD."""
    recorded: dict[str, Any] = {
        "duration": 0.5,
        "completed": 3,
        "failed": 0,
        "input_lens": [8, 8, 8],
        "output_lens": [4, 4, 4],
        "ttfts": [0.1, 0.2, 0.3],
        "itls": [[0.01, 0.02, 0.03], [0.01, 0.01, 0.01], [0.04]],
        "errors": ["", "", ""],
    }
    return recorded | changes


def test_samples_become_requests() -> None:
    visit = visit_of(read_result(result(), LOAD), 2)
    assert (visit.round, visit.duration_s, len(visit.requests)) == (2, 0.5, 3)
    first = visit.requests[0]
    assert (first.prompt_tokens, first.output_tokens, first.ttft_s, first.error) == (8, 4, 0.1, None)
    assert first.latency_s == pytest.approx(0.16) and first.itl_s == [0.01, 0.02, 0.03]
    assert METRICS["output_tokens_per_s"].of(visit) == pytest.approx(24)


@pytest.mark.parametrize(
    ("lengths", "failures", "message"),
    [
        ([4, 0, 4], ["", "Internal Server Error", ""], "Internal Server Error"),
        ([4, 0, 4], ["", "", ""], "no answer"),
        ([4, 0, 4], ["", "Traceback (most recent call last):\n  File x\nClientPayloadError: cut\n", ""],
         "ClientPayloadError: cut"),
        ([4, 2, 4], ["", "", ""], "answered 2 of 4 tokens"),
        ([4, 5, 4], ["", "", ""], "answered 5 of 4 tokens"),
    ],
)  # fmt: skip
def test_failures_have_a_cause_and_no_times(lengths: list[int], failures: list[str], message: str) -> None:
    # 9 seconds is the time of the failed request, which no statistic may see.
    served = read_result(result(output_lens=lengths, errors=failures, ttfts=[0.1, 9.0, 0.3]), LOAD)
    visit = visit_of(served, 0)
    failed = visit.requests[1]
    assert (failed.error, failed.ttft_s, failed.latency_s, failed.itl_s) == (message, None, None, [])
    assert METRICS["ttft_s"].of(visit) == pytest.approx(0.2)
    assert METRICS["output_tokens_per_s"].of(visit) == pytest.approx(16)


@pytest.mark.parametrize(
    "changes", [{"ttfts": [0.1]}, {"errors": None}, {"duration": None}, {"itls": [None, [], []]},
                {name: [] for name in ("input_lens", "output_lens", "ttfts", "itls", "errors")}],
)  # fmt: skip
def test_a_result_of_another_shape_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ServeError):
        read_result(result(**changes), LOAD)
    with pytest.raises(ServeError, match="not understood"):
        read_result({}, LOAD)


def test_a_point_in_lock_step_is_refused(tmp_path: Path) -> None:
    server = Running("http://127.0.0.1:9", "fake", 0, "", None, 0.0)
    with pytest.raises(ConfigError, match="lock step"):
        served_visit(server, tmp_path, Point(name="batch", prompt_tokens=8, output_tokens=4, batch=2), seed=0)


@needs_vllm
@pytest.mark.vllm
def test_injected_failures_are_counted_and_left_out(tmp_path: Path) -> None:
    pico_tokenizer().save_pretrained(str(tmp_path))
    with fake("faulty", tmp_path) as server:
        visit = served_visit(server, tmp_path, POINT, seed=1)
    assert not healthy(server.url)
    found = errors(Series(point="load", visits=[visit]))
    assert sorted(found)[-2:] == ["out of memory"] * 2 and len(found) == 6
    assert [error for error in found if error.startswith("answered")] == ["answered 5 of 6 tokens"] * 2
    assert sum("ClientPayloadError" in error or "ClientConnection" in error for error in found) == 2
    good = succeeded(visit)
    assert len(good) == 2 and len(visit.requests) == POINT.requests
    for request in good:
        assert (request.prompt_tokens, request.output_tokens, len(request.itl_s)) == (9, 6, 5)
        assert request.ttft_s is not None and request.ttft_s >= TOKEN_S
        assert request.latency_s is not None and request.latency_s >= 6 * TOKEN_S


def test_the_generators_own_failures_are_shown(tmp_path: Path) -> None:
    server = Running("http://127.0.0.1:9", "fake", 0, "", None, 0.0)
    with pytest.raises(ConfigError, match="no tokenizer"):
        drive(server, tmp_path / "missing", LOAD)
    with pytest.raises(ServeError, match=r"ended with code 1:(.|\n)*no such dataset"):
        run_generator([sys.executable, "-c", "import sys; sys.exit('no such dataset')"], 600, None)
    with pytest.raises(ServeError, match=r"not finished after 0\.5 s"):
        run_generator([sys.executable, "-c", "import time; time.sleep(60)"], 0.5, None)
    secret = "import os, sys; sys.exit(os.environ['OPENAI_API_KEY'] != 'secret')"
    run_generator([sys.executable, "-c", secret], 600, "secret")


def test_a_server_is_stopped_when_its_user_fails_and_its_own_end_is_noticed(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(ZeroDivisionError), fake("good", tmp_path, said) as server:
        assert healthy(server.url) and server.model == "fake" and server.load_s > 0.2
        raise ZeroDivisionError
    assert not healthy(server.url) and Path(server.log).exists() and server.log in said[0]
    with pytest.raises(ServeError, match="ended by itself"), fake("good", tmp_path) as server:
        os.kill(server.pid, 9)
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
    with fake("good", tmp_path) as server:
        pass
    assert not Path(server.log).exists()


@needs_vllm
@pytest.mark.vllm
def test_a_real_server_under_load(tmp_path: Path) -> None:
    folder = exports(tmp_path, "16:32", torch.bfloat16)["packed"]
    extra = ("--enforce-eager", "--max-model-len", "128", "--block-size", "32", *SERVER_OPTIONS)
    said: list[str] = []
    with serving(ServeOptions(folder, port=0, start_timeout_s=3600, extra=extra), said.append) as server:
        assert server.smoke is not None and server.smoke["total"] >= 8
        visit = served_visit(server, folder, POINT, seed=1)
    assert not healthy(server.url)
    assert errors(Series(point="load", visits=[visit])) == []
    assert [request.output_tokens for request in visit.requests] == [6] * 8
    lengths = [request.prompt_tokens for request in visit.requests]  # the server's; bytes that are no text make 9
    assert 8 <= min(lengths) <= max(lengths) <= 9, lengths
    assert all(value is not None and value > 0 for value in (metric.of(visit) for metric in METRICS.values()))
