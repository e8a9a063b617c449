"""The model that the ONNX server serves: its runner, its tokenizer where the folder has one, and what it answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, NoTokenizer, ServeError
from ..store.checkpoint import read_config
from ..store.reading import read_object
from .onnx_generate import generate
from .onnx_requests import Ask
from .ort import Runner, load_runner, session_errors

_TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Piece:
    """A new token, and the text that became certain with it."""

    token: int
    text: str


@dataclass(frozen=True)
class Answer:
    """All tokens, the one that ends the text included; the text; why it ended: "stop" or "length"."""

    prompt_tokens: int
    tokens: list[int]
    text: str
    reason: str


class Model:
    """What is served. One request at a time: there is one cache."""

    def __init__(self, folder: Path, name: str, max_tokens: int, threads: int) -> None:
        """Load the folder. Raises CheckpointError (a damaged tokenizer too), MissingExtra."""
        from ..texts import load_tokenizer

        config = read_config(folder)
        self.name = name
        self.vocab_size = _positive(config, "vocab_size", folder)
        self.max_tokens = max_tokens
        if "max_position_embeddings" in config:
            self.max_tokens = min(max_tokens, _positive(config, "max_position_embeddings", folder))
        self.runner: Runner = load_runner(folder, self.max_tokens, threads)
        try:
            self.tokenizer: Any = load_tokenizer(folder)
        except NoTokenizer:
            self.tokenizer = None
        self.ends = _ends(config, folder)
        longest = 0 if self.tokenizer is None else max(map(len, self.tokenizer.get_vocab()), default=0)
        self.max_characters = longest * self.max_tokens

    def check(self, ask: Ask) -> None:
        """Raise ConfigError for a request that cannot be answered, where that is known at once."""
        if isinstance(ask.prompt, list) and not ask.chat:
            self._check_tokens(ask.prompt)
        elif self.tokenizer is None:
            raise ConfigError("this folder has no tokenizer: give the prompt as a list of token ids")
        elif ask.chat and self.tokenizer.chat_template is None:
            raise ConfigError("this model has no chat template: use /v1/completions")
        elif ask.characters > self.max_characters:
            raise ConfigError(
                f"the prompt has {ask.characters} characters, more than the {self.max_tokens} tokens that the model "
                "reads can hold"
            )

    def answer(self, ask: Ask, emit: Callable[[Piece], None], cancelled: threading.Event) -> Answer | None:
        """Answer a checked request; None when it was cancelled first, which is asked after every token.

        emit: gets each token of a stream. Raises ConfigError for what the request did wrong, else ServeError.
        """
        if cancelled.is_set():
            return None
        prompt = self._tokens(ask)
        self._check_tokens(prompt)
        words = Words(self._text)
        tokens: list[int] = []
        reason: str | None = None
        try:
            for token, reason in generate(
                self.runner, prompt, ask.sampling, self.ends, self.max_tokens - len(prompt)
            ):  # fmt: skip
                if cancelled.is_set():
                    return None
                tokens.append(token)
                if ask.stream:
                    said = "" if reason == "stop" else words.add(token)
                    emit(Piece(token, said + words.rest() if reason else said))
        except session_errors() as error:
            raise ServeError(f"ONNX Runtime: {error}") from error
        text = self._text(tokens[:-1] if reason == "stop" else tokens)
        return Answer(len(prompt), tokens, text, str(reason))

    def _text(self, tokens: list[int]) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _check_tokens(self, tokens: list[int]) -> None:
        if not all(0 <= token < self.vocab_size for token in tokens):
            raise ConfigError(f"prompt: token ids are from 0 to {self.vocab_size - 1}")
        if not 0 < len(tokens) < self.max_tokens:
            raise ConfigError(f"the prompt has {len(tokens)} tokens and the model reads {self.max_tokens}")

    def _tokens(self, ask: Ask) -> list[int]:
        if isinstance(ask.prompt, list) and not ask.chat:
            return ask.prompt
        if not ask.chat:
            return [int(token) for token in self.tokenizer(ask.prompt)["input_ids"]]
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(ask.prompt, tokenize=False, add_generation_prompt=True)
        except (TemplateError, *_TEMPLATE_ERRORS) as error:
            raise ConfigError(f"messages: the model's chat template does not take them: {error}") from error
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]


class Words:
    """Text from tokens as they come: a character that is spread over several waits for its last."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode = decode
        self.tokens: list[int] = []
        self.start = self.said = 0  # tokens before `start` no longer matter; those before `said` are in the text

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.tokens.append(token)
        text = self._new()
        if not text or text.endswith("\ufffd"):
            return ""
        self.start, self.said = self.said, len(self.tokens)
        return text

    def rest(self) -> str:
        """What is left when no more tokens come."""
        return self._new()

    def _new(self) -> str:
        before = self.decode(self.tokens[self.start : self.said])
        return self.decode(self.tokens[self.start :])[len(before) :]


def _positive(config: dict[str, Any], name: str, folder: Path) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{folder / 'config.json'}: {name} is {value!r:.100}, which is no positive integer")
    return value


def _ends(config: dict[str, Any], folder: Path) -> frozenset[int]:
    """End-of-text tokens: those of generation_config.json where it names any. Raises CheckpointError."""
    path = folder / "generation_config.json"
    named = read_object(path, lenient=True).get("eos_token_id") if path.is_file() else None
    ends = config.get("eos_token_id") if named is None else named
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int for token in listed):
        raise CheckpointError(f"{folder}: eos_token_id is {ends!r:.100}, which is no token id and no list of such")
    return frozenset(listed)
