"""A hub on this machine: what huggingface_hub asks of the real one, answered from a folder of models."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(root: Path) -> Iterator[tuple[str, Counter[str]]]:
    """Serve ROOT/OWNER/NAME/FILE; yields the address, and the bytes that were sent of each file, by its name."""
    sent: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing."""

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                folder = root.joinpath(*parts[2:4])
                files = sorted(folder.glob("*"))
                answer: object = {
                    "id": "/".join(parts[2:4]),
                    "sha": COMMIT,
                    "siblings": [{"rfilename": path.name} for path in files],
                }
                if "tree" in parts:
                    sizes = {path: path.stat().st_size for path in files}
                    answer = [
                        {"type": "file", "path": path.name, "size": size, "oid": "0"} for path, size in sizes.items()
                    ]
                body = json.dumps(answer).encode()
                self._send(200 if folder.is_dir() else 404, body if with_body else b"", {})
                return
            path = root.joinpath(*parts[:2], *parts[4:])  # OWNER/NAME/resolve/REVISION/FILE
            if not path.is_file():
                self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            body, asked = path.read_bytes(), self.headers.get("Range")
            tag = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if asked:
                first, last = asked.removeprefix("bytes=").split("-")
                body = body[int(first) : int(last) + 1 if last else None]
            if with_body:
                sent[path.name] += len(body)
            self._send(206 if asked else 200, body, tag, with_body=with_body)

        def _send(self, status: int, body: bytes, more: dict[str, str], *, with_body: bool = True) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **more}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
