"""Stops that wait while files are half moved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any, Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Uninterrupted:
    """Inside, Ctrl-C, SIGTERM and SIGHUP wait: claiming, renaming and clearing up are never left half done.

    Blocking them would not do: the system then gives them to another of the process's threads, and Python runs its
    handler in the main one all the same. Outside the main thread, where Python runs none, this does nothing.
    """

    def __enter__(self) -> Uninterrupted:
        self._waiting: list[int] = []
        self._before: dict[int, Any] = {}
        try:
            self._hold()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    @contextlib.contextmanager
    def delivered(self) -> Iterator[None]:
        """Inside, they come through as before, those that waited first."""
        try:
            self._release()
            yield
        finally:
            self._hold()

    def _hold(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not None:  # else a handler that is not Python's, and cannot be put back
                    self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        self._waiting.append(number)

    def _release(self) -> None:
        self._restore()
        waiting, self._waiting = self._waiting, []
        for number in waiting:
            signal.raise_signal(number)

    def _restore(self) -> None:
        if self._before:
            try:
                signal.signal(*self._before.popitem())
            finally:  # one of them may come in between
                self._restore()
