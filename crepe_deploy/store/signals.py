"""Signals kept waiting where a stop in the middle would leave something half done."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Uninterrupted:
    """Inside, Ctrl-C, SIGTERM and SIGHUP wait: claiming, renaming and clearing up are never left half done."""

    def __enter__(self) -> Uninterrupted:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)

    @contextlib.contextmanager
    def delivered(self) -> Iterator[None]:
        """Inside, they come through as before, those that waited first."""
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
