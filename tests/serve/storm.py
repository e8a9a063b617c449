"""Load and faults together on the ONNX server; `python -m tests.serve.storm SECONDS [SEED]` prints what came of it.

Clients send good, streamed, bad and abandoned requests while the server, its keeper or the command that started them is
killed and started again. Every answer that is complete must be the model's own greedy tokens or a documented error, a
broken one the beginning of them; after every kill nothing may be left running; memory has a limit.
"""

from __future__ import annotations

import collections
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from crepe_deploy.exporting.pipeline import export_checkpoint
from crepe_deploy.serve.ort import greedy, load_runner

from tests.onnx_models import pruned_model
from tests.serve.processes import HANG_S, below, wait_until_gone

PROMPTS = [[5, 6, 7], [40], [9, 9, 9, 9], list(range(2, 60)), [300, 17, 2, 90, 31], [8] * 30]
LENGTHS = [1, 7, 30, 120]
KILLS = [
    *(("serve", number) for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)),
    ("keeper", signal.SIGKILL),
    *(("server", number) for number in (signal.SIGKILL, signal.SIGTERM)),
]
MORE_MEMORY = 512 << 20  # above what a fresh server takes
SERVE = "from crepe_deploy.cli import main; main()"
BAD = [
    (400, "/v1/completions", b'{"prompt": "a"'),
    (400, "/v1/completions", b"[" * 50_000),
    (400, "/v1/completions", b'{"prompt": "\\ud800"}'),
    (400, "/v1/completions", b'{"prompt": [99999]}'),
    (400, "/v1/completions", b'{"prompt": "' + b"a" * 3_000_000 + b'"}'),
    (400, "/v1/completions", b'{"prompt": "a", "max_tokens": -1}'),
    (400, "/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}]}'),
    (404, "/v1/embeddings", b"{}"),
    (405, "/v1/models", b"{}"),
    (413, "/v1/completions", b'{"prompt": "' + b"a" * 6_000_000 + b'"}'),
]


@dataclass
class Report:
    """What was sent and what became of it; `wrong` is empty when all is well."""

    seconds: float = 0.0
    starts: int = 0
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    requests: collections.Counter[str] = field(default_factory=collections.Counter)
    peak_bytes: int = 0
    wrong: list[str] = field(default_factory=list)


class Storm:
    """The clients, and the server that they talk to while there is one."""

    def __init__(self, folder: Path, logs: Path, seed: int) -> None:
        self.folder, self.logs, self.random = folder, logs, random.Random(seed)
        runner = load_runner(folder, 256, 1)
        self.expected = [greedy(runner, [prompt], max(LENGTHS))[0][0] for prompt in PROMPTS]
        self.report = Report()
        self.address: str | None = None
        self.over = threading.Event()
        self.lock = threading.Lock()

    def client(self, seed: int) -> None:
        """Send requests until the storm is over."""
        own = random.Random(seed)
        kinds = {"whole": self.whole, "stream": self.stream, "bad": self.bad, "abandoned": self.abandoned}
        while not self.over.is_set():
            if (address := self.address) is None:
                time.sleep(0.05)
                continue
            kind = own.choice(list(kinds))
            connection = http.client.HTTPConnection(address, timeout=HANG_S)
            try:
                outcome = kinds[kind](connection, own)
            except (OSError, http.client.HTTPException) as error:
                outcome = "cut by a kill"
                if address == self.address:
                    self.wrong(f"{kind}: {error!r} from a server that was not killed")
            finally:
                connection.close()
            with self.lock:
                self.report.requests[f"{kind}: {outcome}"] += 1

    def wrong(self, what: str) -> None:
        with self.lock:
            self.report.wrong.append(what[:500])

    def whole(self, connection: http.client.HTTPConnection, own: random.Random) -> str:
        body, expected = self.good(own)
        code, content = self.post(connection, "/v1/completions", json.dumps(body).encode())
        if code == 503:
            return "503"
        found = content["choices"][0]["token_ids"] if code == 200 else content
        if found != expected:
            self.wrong(f"{body}: expected {expected}, got {code} {found}")
        return "as expected"

    def stream(self, connection: http.client.HTTPConnection, own: random.Random) -> str:
        body, expected = self.good(own)
        connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}))
        answer = connection.getresponse()
        if answer.status == 503:
            return "503"
        found: list[int] = []
        try:
            while line := answer.readline().strip() or answer.readline().strip():
                if line == b"data: [DONE]":
                    if found != expected:
                        self.wrong(f"{body}: expected {expected}, streamed {answer.status} {found}")
                    return "as expected"
                found += json.loads(line.removeprefix(b"data: "))["choices"][0].get("token_ids", [])
        finally:
            if found != expected[: len(found)]:
                self.wrong(f"{body}: expected {expected}, streamed at first {found}")
        raise http.client.IncompleteRead(b"")

    def bad(self, connection: http.client.HTTPConnection, own: random.Random) -> str:
        code, path, body = own.choice(BAD)
        found, content = self.post(connection, path, body)
        if found not in (code, 503) or content["error"]["code"] != found:
            self.wrong(f"{path} {body[:80]!r}: expected {code}, got {found} {content}")
        return str(found)

    def abandoned(self, connection: http.client.HTTPConnection, own: random.Random) -> str:
        body, _ = self.good(own)
        connection.request("POST", "/v1/completions", json.dumps(body | {"stream": own.random() < 0.5}))
        time.sleep(own.random() * 0.2)
        return "left"

    def good(self, own: random.Random) -> tuple[dict[str, Any], list[int]]:
        index, count = own.randrange(len(PROMPTS)), own.choice(LENGTHS)
        body = {"prompt": PROMPTS[index], "max_tokens": count, "temperature": 0}
        return body | {"ignore_eos": True, "return_token_ids": True}, self.expected[index][:count]

    def post(self, connection: http.client.HTTPConnection, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def serve(self, seconds: float, *, last: bool) -> None:
        """Start a server, let the clients at it, then kill a part of it, and see that nothing stays."""
        command = [
            sys.executable,
            "-P",
            "-c",
            SERVE,
            "serve",
            str(self.folder),
            "--port",
            "0",
            "--json",
            "--threads",
            "1",
        ]
        with (self.logs / "serve.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=os.environ | {"TMPDIR": str(self.logs)}
            )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (self.logs / "serve.log").read_text()[-2000:]
        self.report.starts += 1
        self.address = urlsplit(json.loads(line)["url"]).netloc
        all_of_it = {process.pid, *below(process.pid)}
        fresh = peak_bytes(all_of_it)
        time.sleep(seconds)
        peak = peak_bytes(all_of_it)
        self.report.peak_bytes = max(self.report.peak_bytes, peak)
        if peak > fresh + MORE_MEMORY:
            self.wrong(f"the server took {peak} bytes, {fresh} when fresh")
        part, number = self.random.choice(KILLS) if not last else ("serve", signal.SIGTERM)
        self.report.kills[f"{part} by {number.name}"] += 1
        if last:
            self.over.set()
        self.address = None
        os.kill({"serve": process.pid, **parts(process.pid)}[part], number)
        code = process.wait(HANG_S)
        expected = {("serve", signal.SIGKILL): -9, ("serve", signal.SIGTERM): 0, ("serve", signal.SIGHUP): 0}
        if code != expected.get((part, number), 1):
            self.wrong(f"{part} by {number.name}: serve ended with {code}")
        process.stdout.close()
        wait_until_gone(all_of_it)


def parts(process: int) -> dict[str, int]:
    """The keeper and the server below a `serve`."""
    keeper = next(number for number in below(process) if b"keeper.py" in Path(f"/proc/{number}/cmdline").read_bytes())
    return {"keeper": keeper, "server": next(iter(below(keeper)))}


def peak_bytes(processes: set[int]) -> int:
    """The sum of what each of them held at most."""
    status = "".join(Path(f"/proc/{number}/status").read_text() for number in processes)
    return sum(int(size) * 1024 for size in re.findall(r"VmHWM:\s+(\d+)", status))


def make_folder(root: Path) -> Path:
    """A tiny exported graph."""
    export_checkpoint(pruned_model(root), root / "onnx", "onnx", options={"flavor": "portable", "precision": "fp32"})
    return root / "onnx"


def storm(folder: Path, logs: Path, seconds: float, clients: int = 8, seed: int = 0) -> Report:
    """Storm a server of `folder` for this long, starts included, and at least twice. Raises AssertionError for a wrong
    answer, a process left behind, a wrong exit code, or memory above the limit."""
    this = Storm(folder, logs, seed)
    threads = [threading.Thread(target=this.client, args=(1000 * seed + index,)) for index in range(clients)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        while not this.over.is_set():
            left = seconds - (time.monotonic() - started)
            this.serve(min(this.random.uniform(3, 15), max(left, 3)), last=left < 15 and this.report.starts > 0)
    finally:
        this.over.set()
        for thread in threads:
            thread.join()
    this.report.seconds = round(time.monotonic() - started, 1)
    assert not this.report.wrong, this.report
    return this.report


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="crepe-deploy-storm-") as root:
        found = storm(make_folder(Path(root)), Path(root), float(sys.argv[1]), seed=int((sys.argv[2:] or ["0"])[0]))
        print(json.dumps(vars(found), indent=1))
