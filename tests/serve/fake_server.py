"""Stands in for vLLM's OpenAI server: `fake_server.py PORT MODE`. Modes: good, wrong, dies, never, quits, stubborn."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

TOKENS = [5, 6, 7, 8]


class Handler(BaseHTTPRequestHandler):
    mode = "good"

    def do_GET(self) -> None:
        if self.path == "/health":
            self.send_response(503 if self.mode == "never" else 200)
            self.end_headers()
        else:
            self.answer({"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if os.environ.get("VLLM_API_KEY", "") not in self.headers.get("Authorization", ""):
            self.send_error(401)
            return
        tokens = TOKENS if self.mode != "wrong" else [TOKENS[0], 99, *TOKENS[2:]]
        self.answer({"choices": [{"token_ids": tokens[: body["max_tokens"]]}]})
        if self.mode == "quits":
            threading.Timer(0.5, os._exit, [7]).start()

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
        signal.signal(number, signal.SIG_IGN if mode == "stubborn" else stop)
    Handler.mode = mode
    time.sleep(0.3)
    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
