"""A small OpenAI-style server of one ONNX folder, for machines without vLLM. One request at a time, the others wait.

    python -m crepe_deploy.serve.onnx_server FOLDER --host 127.0.0.1 --port 8000 [--max-model-len N] [--threads N]

GET /health, GET /v1/models, POST /v1/completions and /v1/chat/completions, streamed where asked. The key that clients
must send, if any, is in VLLM_API_KEY, as with vLLM. What is not supported is refused by name, never ignored; what a
client no longer waits for is not computed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..errors import ConfigError, CrepeError
from ..store.reading import parse_json
from .key import RequireKey, error_body
from .onnx_model import Answer, Model, Piece
from .onnx_requests import Ask
from .passed_on import ONNX_CONTEXT
from .patience import Patient

MAX_BODY_BYTES: Final = 4 << 20
MAX_DISCARDED_BYTES: Final = 256 << 20  # of a body that is refused: read, so that its sender reads why
BODY_S: Final = 60  # for a body to arrive
MAX_REQUESTS: Final = 64  # that arrive, wait or are answered
RETRY_AFTER_S: Final = 5
CLOSING_S: Final = 5
CLIENT_GONE: Final = 499
CHAT: Final = "/v1/chat/completions"


class Job:
    """One request on its way: its tokens as they come, None after the last, and its answer."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.cancelled = threading.Event()
        self.pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self.answer: asyncio.Future[Answer | None]

    def start(self, model: Model, worker: ThreadPoolExecutor) -> None:
        """Have it answered when its turn comes."""
        loop = asyncio.get_running_loop()

        def emit(piece: Piece) -> None:
            loop.call_soon_threadsafe(self.pieces.put_nowait, piece)

        self.answer = asyncio.wrap_future(worker.submit(model.answer, self.ask, emit, self.cancelled))
        self.answer.add_done_callback(lambda _: self.pieces.put_nowait(None))

    def error(self) -> BaseException | None:
        """What went wrong, once it is done."""
        return self.answer.exception() if self.answer.done() and not self.answer.cancelled() else None


class Service:
    """The server's requests: how many are let in, and the one thread that answers them."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.worker = ThreadPoolExecutor(1)
        self.arriving = 0
        self.jobs: set[Job] = set()

    async def models(self, _request: Request) -> Response:
        """The one model."""
        entry = {"id": self.model.name, "object": "model", "created": int(time.time()), "owned_by": "crepe-deploy"}
        return JSONResponse({"object": "list", "data": [entry | {"max_model_len": self.model.max_tokens}]})

    async def complete(self, request: Request) -> Response:
        """A completion or the answer of a chat, whole or streamed; 503 when too many requests are here already."""
        busy = self.arriving + len(self.jobs) >= MAX_REQUESTS
        self.arriving += 1
        try:
            body = await read_body(request, 0 if busy else MAX_BODY_BYTES)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        finally:
            self.arriving -= 1
        if busy:
            message = f"{MAX_REQUESTS} requests are waiting: try again later"
            raise HTTPException(503, message, {"Retry-After": str(RETRY_AFTER_S)})
        if body is None:
            raise HTTPException(413, f"a body has at most {MAX_BODY_BYTES} bytes")
        ask = Ask.checked(parse_json(body, "the body", ConfigError), self.model.name, chat=request.url.path == CHAT)
        self.model.check(ask)
        return await self._answer(request, Job(ask))

    async def _answer(self, request: Request, job: Job) -> Response:
        """Wait for a whole answer, or for the first token of a stream, while the client does."""
        job.start(self.model, self.worker)
        self.jobs.add(job)
        job.answer.add_done_callback(lambda _: self.jobs.discard(job))
        gone = asyncio.ensure_future(_gone(request))
        wanted = asyncio.ensure_future(job.pieces.get())
        try:
            await asyncio.wait({wanted if job.ask.stream else job.answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if (error := job.error()) is not None:
                raise error
            if job.ask.stream and wanted.done() and (first := wanted.result()) is not None:
                events = stream(self.model.name, job, first)
                return StreamingResponse(
                    events, media_type="text/event-stream", headers={"Cache-Control": "no-store"},
                    background=BackgroundTask(job.cancelled.set),
                )  # fmt: skip
            if job.answer.done() and (answer := job.answer.result()) is not None:
                return JSONResponse(whole(self.model.name, job.ask, answer))
            job.cancelled.set()
            return Response(status_code=CLIENT_GONE)
        except asyncio.CancelledError:
            job.cancelled.set()
            raise
        finally:
            gone.cancel()
            wanted.cancel()

    def close(self) -> None:
        """Compute nothing more."""
        for job in self.jobs:
            job.cancelled.set()
        self.worker.shutdown(cancel_futures=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, limit: int) -> bytes | None:
    """The body, or None where it has more than `limit` bytes. Raises HTTPException 408 where it does not come."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    body += part
                elif size > MAX_DISCARDED_BYTES:
                    break
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not arrive in {BODY_S} s") from error
    return bytes(body) if size <= limit else None


def whole(name: str, ask: Ask, answer: Answer) -> dict[str, Any]:
    """An answer in one."""
    said = {"message": {"role": "assistant", "content": answer.text}} if ask.chat else {"text": answer.text}
    choice: dict[str, Any] = {"index": 0, "finish_reason": answer.reason, "logprobs": None, **said}
    if ask.return_token_ids:
        choice["token_ids"] = answer.tokens
    return envelope(name, ask) | {"choices": [choice], "usage": usage(answer)}


async def stream(name: str, job: Job, first: Piece) -> AsyncIterator[str]:
    """An answer as events: its pieces, why it ended, what it took where that was asked for, and [DONE]."""
    head = envelope(name, job.ask)

    def event(said: dict[str, Any], reason: str | None = None, token: int | None = None) -> str:
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None, **said}
        if job.ask.return_token_ids and token is not None:
            choice["token_ids"] = [token]
        return _data(head | {"choices": [choice]})

    if job.ask.chat:
        yield event({"delta": {"role": "assistant", "content": ""}})
    piece: Piece | None = first
    while piece is not None:
        if piece.text or job.ask.return_token_ids:
            yield event({"delta": {"content": piece.text}} if job.ask.chat else {"text": piece.text}, token=piece.token)
        piece = await job.pieces.get()
    if (error := job.error()) is not None:
        yield _data(error_body(500, str(error)))
    elif (answer := job.answer.result()) is not None:
        yield event({"delta": {}} if job.ask.chat else {"text": ""}, answer.reason)
        if job.ask.include_usage:
            yield _data(head | {"choices": [], "usage": usage(answer)})
    yield "data: [DONE]\n\n"


def envelope(name: str, ask: Ask) -> dict[str, Any]:
    """What every answer and every event of one says of itself."""
    kind = ("chat.completion.chunk" if ask.stream else "chat.completion") if ask.chat else "text_completion"
    start = "chatcmpl" if ask.chat else "cmpl"
    return {"id": f"{start}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}


def usage(answer: Answer) -> dict[str, int]:
    """How many tokens were read and written."""
    read, written = answer.prompt_tokens, len(answer.tokens)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _data(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def failure(_request: Request, error: Exception) -> Response:
    """Any error as OpenAI's API gives it."""
    if isinstance(error, HTTPException):
        return JSONResponse(error_body(error.status_code, error.detail), error.status_code, error.headers)
    code = 400 if isinstance(error, ConfigError) else 500
    message = str(error) if isinstance(error, CrepeError) else "an unexpected error; the server's log has it"
    return JSONResponse(error_body(code, message), code)


def application(service: Service) -> Starlette:
    """The server's paths."""
    routes = [
        Route("/health", lambda _: JSONResponse({})),
        Route("/v1/models", service.models),
        *(Route(path, service.complete, methods=["POST"]) for path in ("/v1/completions", CHAT)),
    ]
    handlers: dict[Any, Any] = dict.fromkeys((HTTPException, CrepeError, Exception), failure)
    return Starlette(routes=routes, middleware=[Middleware(RequireKey)], exception_handlers=handlers)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="crepe-deploy serve (ONNX)", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", default=None)
    parser.add_argument("--max-model-len", type=int, default=ONNX_CONTEXT)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    name = options.served_model_name or options.folder.resolve().name
    try:
        service = Service(Model(options.folder, name, options.max_model_len, options.threads))
    except CrepeError as error:
        sys.exit(f"error: {error}")
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises again what it got, when it has stopped
        signal.signal(number, lambda *_: None)
    try:
        uvicorn.run(
            application(service), host=options.host, port=options.port, http=Patient, ws="none", lifespan="off",
            loop="asyncio", log_level="warning", access_log=False, timeout_graceful_shutdown=CLOSING_S,
        )  # fmt: skip
    finally:
        service.close()


if __name__ == "__main__":
    main()
