"""Ctrl-C at a chosen place of a run."""

from __future__ import annotations

from typing import Any


class Stop:
    """Calls through, and presses Ctrl-C at the n-th call."""

    def __init__(self, inner: Any, at: int) -> None:
        self.inner, self.left = inner, at

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.inner(*args, **kwargs)
