"""Choosing tokens from the logits of a runner: greedy or sampled, until the text ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, ServeError
from .ort import Logits, Runner


@dataclass(frozen=True)
class Sampling:
    """temperature 0: greedy. top_p: sample among the fewest best tokens that hold this probability."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False

    @classmethod
    def checked(cls, given: dict[str, Any]) -> Sampling:
        """From a request's fields. Raises ConfigError naming the one that is wrong."""
        kinds: dict[str, tuple[type, ...]] = {
            "max_tokens": (int,), "temperature": (int, float), "top_p": (int, float), "seed": (int,),
            "ignore_eos": (bool,),
        }  # fmt: skip
        for name, value in given.items():
            if not isinstance(value, kinds[name]) or (isinstance(value, bool) and name != "ignore_eos"):
                raise ConfigError(f"'{name}' is {value!r}, which is no {kinds[name][-1].__name__}")
        sampling = cls(**given)
        if sampling.max_tokens < 1 or not 0 <= sampling.temperature <= 2 or not 0 < sampling.top_p <= 1:
            raise ConfigError("max_tokens is at least 1, temperature from 0 to 2, top_p above 0 and at most 1")
        if sampling.seed is not None and sampling.seed < 0:
            raise ConfigError("seed is 0 or more")
        return sampling


def generate(
    runner: Runner, prompt: Sequence[int], sampling: Sampling, ends: frozenset[int], room: int
) -> Iterator[tuple[int, str | None]]:
    """The tokens after `prompt`, an end token included, each once it is chosen; with the last comes why it is that:
    "stop" or "length" (at most `room`). Raises ServeError for logits that are not numbers."""
    random = np.random.default_rng(sampling.seed)
    logits = runner.start([prompt])
    for left in range(min(sampling.max_tokens, room) - 1, -1, -1):
        token = choose(logits[0], sampling, random)
        if token in ends and not sampling.ignore_eos:
            yield token, "stop"
            return
        yield token, None if left else "length"
        if left:
            logits = runner.step([token])


def choose(logits: Logits, sampling: Sampling, random: np.random.Generator) -> int:
    """One token from logits (vocab,). Raises ServeError where they are not numbers."""
    if not np.isfinite(logits.max()):  # a NaN is the maximum
        raise ServeError("the model computes logits that are not numbers: a damaged graph, or float16 that overflows")
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    order = np.argsort(-scaled)
    weights = np.exp(scaled[order])
    weights /= weights.sum()
    kept = int(np.searchsorted(weights.cumsum(), sampling.top_p)) + 1
    return int(random.choice(order[:kept], p=weights[:kept] / weights[:kept].sum()))
