"""What may be asked of the ONNX server: a request of OpenAI's API, every field of it checked or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from ..errors import ConfigError
from .onnx_generate import Sampling

_SAMPLING: Final = {"max_tokens", "temperature", "top_p", "seed", "ignore_eos"}
_FLAGS: Final = ("stream", "return_token_ids")
_KNOWN: Final = {*_SAMPLING, *_FLAGS, "model", "user", "max_completion_tokens", "stream_options"}
_NEUTRAL: Final[dict[str, Any]] = {
    "n": 1, "echo": False, "logprobs": None, "stop": None, "frequency_penalty": 0, "presence_penalty": 0,
    "repetition_penalty": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """A checked request. prompt: a text, token ids, or, of a chat, its messages."""

    chat: bool
    prompt: Any
    sampling: Sampling
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False

    @classmethod
    def checked(cls, body: Any, model: str, *, chat: bool) -> Ask:
        """From a request's body. Raises ConfigError for a field that is missing, wrong or not supported."""
        if not isinstance(body, dict):
            raise ConfigError("the body is no JSON object")
        prompt = "messages" if chat else "prompt"
        if prompt not in body:
            raise ConfigError(f"'{prompt}' is missing")
        for name, value in body.items():
            if name not in _KNOWN and name != prompt and value != _NEUTRAL.get(name, ...):
                raise ConfigError(f"'{name[:100]}' is not supported by this server")
        if body.get("model", model) != model:
            raise ConfigError(f"model {str(body['model'])[:100]!r} is not served here; '{model}' is")
        flags = {name: body.get(name) or False for name in _FLAGS}
        if wrong := next((name for name, value in flags.items() if not isinstance(value, bool)), None):
            raise ConfigError(f"'{wrong}' is true or false")
        given = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
        if body.get("max_completion_tokens") is not None:
            given["max_tokens"] = body["max_completion_tokens"]
        usage = _include_usage(body.get("stream_options"), stream=flags["stream"])
        asked = _messages(body[prompt]) if chat else _prompt(body[prompt])
        return cls(chat, asked, Sampling.checked(given), include_usage=usage, **flags)

    @property
    def characters(self) -> int:
        """How much text it brings."""
        if isinstance(self.prompt, str):
            return len(self.prompt)
        return sum(len(message["content"]) for message in self.prompt) if self.chat else 0


def _include_usage(options: Any, *, stream: bool) -> bool:
    if options is None:
        return False
    if not stream:
        raise ConfigError("'stream_options' goes with stream: true")
    if not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
        raise ConfigError("'stream_options' holds include_usage only")
    include = options.get("include_usage", False)
    if not isinstance(include, bool):
        raise ConfigError("'stream_options': include_usage is true or false")
    return include


def _prompt(given: Any) -> Any:
    ids = isinstance(given, list) and all(type(token) is int for token in given)
    if not given or not (ids or isinstance(given, str)):
        raise ConfigError("prompt: one string or one list of token ids is read, and it may not be empty")
    return given


def _messages(given: Any) -> Any:
    if not isinstance(given, list) or not given or not all(isinstance(message, dict) for message in given):
        raise ConfigError("messages: a list of objects with role and content is read")
    if not all(isinstance(message.get(key), str) for message in given for key in ("role", "content")):
        raise ConfigError("messages: role and content are strings here")
    return given
