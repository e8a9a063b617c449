"""Requests that never arrive whole: the ONNX server answers 408 or hangs up, and goes on answering others."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from crepe_deploy.serve import onnx_server
from crepe_deploy.serve.patience import Patient

GUARD_S = 3600
BEGUN = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
STARTED = BEGUN + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n"


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The server's paths and its patience, made short, without a model: nothing here gets as far as one."""
    monkeypatch.setattr(onnx_server, "BODY_S", 0.2)
    monkeypatch.setattr(Patient, "arrival_s", 0.2)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    app = onnx_server.application(onnx_server.Service(None))  # type: ignore[arg-type]
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=Patient, ws="none", lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(GUARD_S)
    listening.close()


def said(port: int, *parts: bytes) -> bytes:
    """All that the server says to a client that sends these and then waits; returns when it hangs up."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=GUARD_S) as client:
        for part in parts:
            client.sendall(part)
        while received := client.recv(1 << 16):
            answer += received
    return answer


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ((), b""), ((b"P",), b"408"), ((BEGUN,), b"408"), ((BEGUN, b"X-Slow: "), b"408"), ((STARTED,), b"408"),
        ((STARTED, b'{"prompt": '), b"408"), ((STARTED.replace(b"completions", b"nowhere"),), b"404"),
        ((b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", BEGUN), b"200"),
    ],
)  # fmt: skip
def test_what_does_not_arrive_is_not_waited_for(port: int, parts: tuple[bytes, ...], status: bytes) -> None:
    assert said(port, *parts)[9:12] == status
    assert said(port, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")[9:12] == b"200"


def test_a_client_that_sends_a_byte_at_a_time_gains_nothing(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=GUARD_S) as client:
        client.setblocking(False)
        client.sendall(BEGUN)
        waiting = threading.Event()
        while True:
            waiting.wait(0.02)
            try:
                client.sendall(b"x")
                if client.recv(1 << 16)[9:12] == b"408":
                    break
            except BlockingIOError:
                continue
            except ConnectionError:
                break  # hung up while the next byte was on its way
