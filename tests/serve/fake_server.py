"""Stands in for vLLM's OpenAI server: `fake_server.py PORT MODE`.

Modes: good, wrong, dies, never, quits, stubborn; brood: stubborn, with a child in a session of its own and a grandchild
that lost its parent; faulty: of four streams one is good, one is refused, one breaks off in the middle, and one is a
token short.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS = [5, 6, 7, 8]
TOKEN_S = 0.02


class Handler(BaseHTTPRequestHandler):
    mode = "good"
    streams = itertools.count()
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.send_response(503 if self.mode == "never" else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.answer({"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if os.environ.get("VLLM_API_KEY", "") not in self.headers.get("Authorization", ""):
            self.send_error(401)
            return
        if self.path != "/v1/completions":
            self.send_error(404)
            return
        if body.get("stream"):
            self.stream(body["max_tokens"], next(self.streams) % 4 if self.mode == "faulty" else 0)
            return
        tokens = TOKENS if self.mode != "wrong" else [TOKENS[0], 99, *TOKENS[2:]]
        self.answer({"choices": [{"token_ids": tokens[: body["max_tokens"]]}]})
        if self.mode == "quits":
            threading.Timer(0.5, os._exit, [7]).start()

    def stream(self, count: int, fault: int) -> None:
        if fault == 1:
            self.send_error(500, "out of memory")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count -= fault == 3
        for index in range(count):
            if fault == 2 and index == count // 2:
                self.close_connection = True
                self.connection.close()
                return
            time.sleep(TOKEN_S)
            self.event({"choices": [{"text": "a"}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": count}})
        self.wfile.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def event(self, content: dict[str, Any]) -> None:
        data = f"data: {json.dumps(content)}\n\n".encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def stop(number: int, _frame: Any) -> None:
    print(f"got signal {number}", flush=True)
    os._exit(0)


def main() -> None:
    port, mode = int(sys.argv[1]), sys.argv[2]
    print(f"fake server, mode {mode}, cache {os.environ['VLLM_CPU_KVCACHE_SPACE']}", flush=True)
    if mode == "dies":
        sys.exit("ValueError: no room for the model")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN if mode in ("stubborn", "brood") else stop)
    if mode == "brood":
        subprocess.Popen(["sleep", "3600"], start_new_session=True)
        subprocess.Popen(["sh", "-c", "setsid sleep 3600 & exit"]).wait()
    Handler.mode = mode
    time.sleep(0.3)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
