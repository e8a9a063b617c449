"""The smoke check of a fresh server: it must continue the manifest's prompt as the dense checkpoint did."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..errors import ServeError

# Gaps between the two best logits within which other kernels may round to the other token.
ROUNDING: Final = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}
_OPENER: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a local server needs no proxy


@dataclass(frozen=True)
class Agreement:
    """How many tokens agree before the first difference, of how many; `tie_gap` is the logit gap there, if any."""

    agreed: int
    total: int
    dtype: str
    tie_gap: float | None = None

    def __str__(self) -> str:
        counted = f"{self.agreed} of {self.total} greedy tokens agree with the manifest ({self.dtype})"
        if self.tie_gap is None:
            return counted
        return f"{counted}; token {self.agreed + 1} is a rounding tie: its two best logits were {self.tie_gap:g} apart"


def compare(greedy: dict[str, Any], found: Sequence[int], dtype: str) -> Agreement:
    """Compare served tokens with the recorded ones. Raises ServeError for a difference that rounding cannot explain.

    dtype: what the server computes in. After a tie the texts differ, so nothing behind the first one is compared.
    """
    expected, margins = greedy["token_ids"], greedy["margins"]
    agreed = next(
        (i for i, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]),
        min(len(expected), len(found)),
    )
    if agreed == len(expected):
        return Agreement(agreed, len(expected), dtype)
    allowed = max(ROUNDING.get(name, 0.0) for name in (dtype, greedy["dtype"]))
    if agreed < len(found) and margins[agreed] <= allowed:
        return Agreement(agreed, len(expected), dtype, margins[agreed])
    raise ServeError(
        f"the server's answer is not this checkpoint's: token {agreed + 1} of the recorded prompt differs "
        f"(expected {expected[agreed : agreed + 4]}, got {list(found[agreed : agreed + 4])}), though the best logit "
        f"leads by {margins[agreed]:g}"
    )


def complete(url: str, prompt_token_ids: Sequence[int], count: int, api_key: str | None) -> list[int]:
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
            content = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise ServeError(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:300]}") from error
    except (OSError, ValueError) as error:
        raise ServeError(f"{url} did not answer: {error}") from error
    if not isinstance(content, dict):
        raise ServeError(f"{url} answered no JSON object")
    return content


def healthy(url: str) -> bool:
    """Whether `url`/health answers 200 now."""
    try:
        with _OPENER.open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:  # URLError and HTTPError are OSErrors: not up yet
        return False
