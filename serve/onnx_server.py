"""A small OpenAI-style server of one ONNX folder, for machines without vLLM. One request at a time.

    python -m crepe_deploy.serve.onnx_server FOLDER --host 127.0.0.1 --port 8000 [--max-model-len N] [--threads N]

GET /health, GET /v1/models, POST /v1/completions and /v1/chat/completions. The key that clients must send, if any, is
in VLLM_API_KEY, as with vLLM. What is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import signal
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from ..errors import ConfigError, CrepeError, NoTokenizer
from ..store.checkpoint import read_config
from ..store.reading import read_object
from .onnx_generate import Sampling, generate
from .ort import Runner, load_runner

MAX_BODY_BYTES: Final = 8 << 20
_SAMPLING: Final = {"max_tokens", "temperature", "top_p", "seed", "ignore_eos"}
_SHARED: Final = _SAMPLING | {"model", "return_token_ids", "user", "max_completion_tokens"}
_NEUTRAL: Final[dict[str, Any]] = {"n": 1, "stream": False, "echo": False, "logprobs": None, "stop": None}
_PROMPT: Final = {"/v1/completions": "prompt", "/v1/chat/completions": "messages"}


class Model:
    """What is served: the runner, its tokenizer where the folder has one, and one lock, as there is one cache."""

    def __init__(self, folder: Path, name: str, max_tokens: int, threads: int) -> None:
        from ..texts import load_tokenizer

        config = read_config(folder)
        self.name = name
        self.max_tokens = min(max_tokens, int(config.get("max_position_embeddings", max_tokens)))
        self.vocab_size = int(config["vocab_size"])
        self.runner: Runner = load_runner(folder, self.max_tokens, threads)
        try:
            self.tokenizer: Any = load_tokenizer(folder)
        except NoTokenizer:
            self.tokenizer = None
        ends = _ends(config, folder)
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self.lock = threading.Lock()

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The OpenAI answer to a request. Raises ConfigError naming the field that is wrong or not supported."""
        chat = path != "/v1/completions"
        sampling = _sampling(body, _PROMPT[path], self.name)
        prompt = self._prompt(body[_PROMPT[path]], chat)
        room = self.max_tokens - len(prompt)
        if room < 1:
            raise ConfigError(f"the prompt has {len(prompt)} tokens and the model reads {self.max_tokens}")
        with self.lock:
            tokens, reason = generate(self.runner, prompt, sampling, self.ends, room)
        said = tokens[:-1] if reason == "stop" else tokens
        text = "" if self.tokenizer is None else self.tokenizer.decode(said, skip_special_tokens=True)
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if body.get("return_token_ids"):
            choice["token_ids"] = tokens
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [choice],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(tokens),
                "total_tokens": len(prompt) + len(tokens),
            },
        }

    def _prompt(self, given: Any, chat: bool) -> list[int]:
        if isinstance(given, list) and given and not chat and all(type(token) is int for token in given):
            if not all(0 <= token < self.vocab_size for token in given):
                raise ConfigError(f"prompt: token ids are from 0 to {self.vocab_size - 1}")
            return given
        if self.tokenizer is None:
            raise ConfigError("this folder has no tokenizer: give the prompt as a list of token ids")
        if chat:
            return self._chat(given)
        if not isinstance(given, str) or not given:
            raise ConfigError("prompt: one string or one list of token ids is read, and it may not be empty")
        return [int(token) for token in self.tokenizer(given)["input_ids"]]

    def _chat(self, messages: Any) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise ConfigError("this model has no chat template: use /v1/completions")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages) or not messages:
            raise ConfigError("messages: a list of objects with role and content is read")
        if not all(isinstance(message.get(key), str) for message in messages for key in ("role", "content")):
            raise ConfigError("messages: role and content are strings here")
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]


def _ends(config: dict[str, Any], folder: Path) -> Any:
    """End-of-text tokens: those of generation_config.json where it names any."""
    path = folder / "generation_config.json"
    named = read_object(path).get("eos_token_id") if path.is_file() else None
    return config.get("eos_token_id") if named is None else named


def _sampling(body: dict[str, Any], prompt: str, model: str) -> Sampling:
    """The request's sampling. Raises ConfigError for a field that is missing, wrong or not supported."""
    if prompt not in body:
        raise ConfigError(f"'{prompt}' is missing")
    for name, value in body.items():
        if name not in _SHARED and name != prompt and value != _NEUTRAL.get(name, ...):
            raise ConfigError(f"'{name}' is not supported by this server")
    if body.get("model", model) != model:
        raise ConfigError(f"model '{body['model']}' is not served here; '{model}' is")
    given = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    if body.get("max_completion_tokens") is not None:
        given["max_tokens"] = body["max_completion_tokens"]
    return Sampling.checked(given)


class Handler(BaseHTTPRequestHandler):
    """One request. `model` and `key` are set on the class before the server starts."""

    model: Model
    key: str | None = None
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """Health without a key; the model's name with it."""
        if self.path == "/health":
            self._send(200, {})
        elif self._allowed() and self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": self.model.name, "object": "model"}]})
        elif self._allowed():
            self._fail(404, f"there is no {self.path}")
        else:
            self._fail(401, "a valid key is needed: Authorization: Bearer KEY")

    def do_POST(self) -> None:
        """A completion."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._fail(413 if length.isdigit() else 411, f"a Content-Length of at most {MAX_BODY_BYTES} is needed")
            return
        data = self.rfile.read(int(length))
        if not self._allowed():
            self._fail(401, "a valid key is needed: Authorization: Bearer KEY")
        elif self.path not in _PROMPT:
            self._fail(404, f"there is no {self.path}")
        else:
            self._complete(data)

    def _complete(self, data: bytes) -> None:
        try:
            body = json.loads(data)
            if not isinstance(body, dict):
                raise ConfigError("the body is no JSON object")
            answer = self.model.answer(self.path, body)
        except (ValueError, ConfigError) as error:
            self._fail(400, str(error))
        except CrepeError as error:
            self._fail(500, str(error))
        else:
            self._send(200, answer)

    def _allowed(self) -> bool:
        given = self.headers.get("Authorization", "").encode()
        return self.key is None or hmac.compare_digest(given, f"Bearer {self.key}".encode())

    def _fail(self, code: int, message: str) -> None:
        self._send(code, {"error": {"message": message, "code": code}})

    def _send(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main() -> None:
    """Serve until SIGINT or SIGTERM."""
    parser = argparse.ArgumentParser(prog="crepe-deploy serve (ONNX)")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", default=None)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    name = options.served_model_name or options.folder.resolve().name
    try:
        Handler.model = Model(options.folder, name, options.max_model_len, options.threads)
    except CrepeError as error:
        sys.exit(f"error: {error}")
    Handler.key = os.environ.get("VLLM_API_KEY") or None
    ThreadingHTTPServer.address_family = _family(options.host)
    server = ThreadingHTTPServer((options.host, options.port), Handler)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()
    server.server_close()


def _family(host: str) -> Any:
    import socket

    return socket.AF_INET6 if ":" in host else socket.AF_INET


if __name__ == "__main__":
    main()
