"""The smoke check of a fresh server: it must continue the manifest's prompt as the dense checkpoint did."""

from __future__ import annotations

import http.client
import itertools
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ServeError
from ..store.reading import parse_json

# Gaps between the two best float32 logits within which a server that computes in this dtype may choose the other.
# int4 graphs round activations too, by whichever instructions the machine has.
ROUNDING: Final = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5, "int4": 0.5}
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a local server needs no proxy


Ask = Callable[[Sequence[int], int], Sequence[int]]


@dataclass(frozen=True)
class Agreement:
    """How many served tokens are the recorded ones. `ties`: for each that is not, how far the best logit led there."""

    agreed: int
    total: int
    dtype: str
    ties: tuple[float, ...] = ()

    def __str__(self) -> str:
        counted = f"{self.agreed} of {self.total} greedy tokens agree with the manifest ({self.dtype})"
        if not self.ties:
            return counted
        gaps = ", ".join(f"{gap:g}" for gap in self.ties)
        return f"{counted}; {len(self.ties)} fell to rounding, where the two best logits were {gaps} apart"


def compare(greedy: dict[str, Any], dtype: str, ask: Ask) -> Agreement:
    """Compare a server's greedy tokens with the recorded ones, which were computed in float32.

    dtype: what the server computes in. ask: (prompt token ids, count) -> the server's tokens. Where it differs within
    that dtype's rounding, it is asked again from the recorded token on, so that every token is compared. Raises
    ServeError for a difference that rounding cannot explain.
    """
    prompt, expected, margins = list(greedy["prompt_token_ids"]), greedy["token_ids"], greedy["margins"]
    place, ties = 0, []
    while place < len(expected):
        served = ask([*prompt, *expected[:place]], len(expected) - place)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(expected[place:], served, strict=False))
        step = sum(1 for _ in same)
        place += step
        if place == len(expected):
            break
        if step == len(served) or margins[place] > ROUNDING.get(dtype, 0.0):
            raise ServeError(
                f"the server's answer is not this checkpoint's: token {place + 1} of the recorded prompt differs "
                f"(expected {expected[place : place + 4]}, got {list(served[step : step + 4])}), though the best logit "
                f"leads by {margins[place]:g} and {dtype} is compared within {ROUNDING.get(dtype, 0.0):g}"
            )
        ties.append(margins[place])
        place += 1
    return Agreement(len(expected) - len(ties), len(expected), dtype, tuple(ties))


def complete(url: str, api_key: str | None, prompt_token_ids: Sequence[int], count: int) -> list[int]:
    """Greedy token ids from the OpenAI completions API at `url`. Raises ServeError."""
    body = {
        "model": model_name(url, api_key),
        "prompt": list(prompt_token_ids),
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    answer = request(f"{url}/v1/completions", body, api_key)
    try:
        return [int(token) for token in answer["choices"][0]["token_ids"]]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ServeError(f"the server answered without token ids: {json.dumps(answer)[:300]}") from error


def model_name(url: str, api_key: str | None) -> str:
    """The name under which the server at `url` serves its model. Raises ServeError."""
    answer = request(f"{url}/v1/models", None, api_key)
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise ServeError(f"{url} names no model: {json.dumps(answer)[:300]}") from error


def request(url: str, body: dict[str, Any] | None, api_key: str | None, timeout_s: float = 300) -> dict[str, Any]:
    """GET, or POST `body` as JSON; returns the JSON answer. Raises ServeError naming the address and the answer."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with _OPENER.open(urllib.request.Request(url, data, headers), timeout=timeout_s) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise ServeError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:300]}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ServeError(f"{url} did not answer: {error}") from error
    content = parse_json(text, f"the answer of {url}", ServeError)
    if not isinstance(content, dict):
        raise ServeError(f"{url} answered no JSON object")
    return content


def healthy(url: str) -> bool:
    """Whether `url`/health answers 200 now."""
    try:
        with _OPENER.open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):  # URLError and HTTPError are OSErrors: not up yet
        return False
