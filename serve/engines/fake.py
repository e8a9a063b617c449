"""A fake engine, for tests and for trying a scenario out: it holds no model, sleeps, and fails where it is told to."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from .base import Prompts, Settings, check_lengths, check_options

OPTIONS: Final = ("prefill_token_s", "step_s", "fail_every", "die_after", "short_every")


class FakeEngine:
    """Sleeps `prefill_token_s` for each prompt token and `step_s` for each later output token.

    fail_every: every so manieth request fails. short_every: it stops a token early. die_after: the process ends after
    so many requests.
    """

    @classmethod
    def require(cls, options: dict[str, Any]) -> None:
        """Raise ConfigError for an unknown option."""
        check_options("fake", options, OPTIONS)

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.options, self.count = folder, settings.options, 0

    def generate(self, prompts: Prompts, tokens: int) -> list[float]:
        """Sleep as if it worked."""
        self.count += 1
        if self._due("fail_every"):
            raise RuntimeError("the fake engine was told to fail")
        if self.count > self.options.get("die_after", self.count):
            print("the fake engine was told to die", file=sys.stderr, flush=True)
            os._exit(9)
        times = []
        for index in range(tokens - self._due("short_every")):
            wait = self.options.get("step_s", 0.0) if index else self._prefill_s(prompts)
            time.sleep(wait)
            times.append(time.perf_counter())
        check_lengths([len(times)], tokens)
        return times

    def describe(self) -> dict[str, Any]:
        """Nothing is held."""
        return {"dtype": "none", "linear_bytes": None, "linears": 0, "kernels": {}}

    def close(self) -> None:
        """Nothing to free."""

    def _due(self, option: str) -> bool:
        every = int(self.options.get(option, 0))
        return every > 0 and self.count % every == 0

    def _prefill_s(self, prompts: Prompts) -> float:
        return float(self.options.get("prefill_token_s", 0.0)) * sum(map(len, prompts))
