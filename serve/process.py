"""A server's process under its keeper: started, waited for, told of signals, ended with everything that it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ..errors import ServeError
from ..progress import Say, unsaid
from .phases import phase, telling
from .smoke import healthy

STOP_TIMEOUT_S: Final = 30.0
KEEPER_TIMEOUT_S: Final = 30.0
POLL_S: Final = 0.25
NEWS_S: Final = 20.0
TAIL_LINES: Final = 25
TAIL_BYTES: Final = 64 << 10
LINE_CHARS: Final = 120
_KEEPER: Final = Path(__file__).with_name("keeper.py")
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class Server:
    """A running server: its keeper's process, its log, and the signals that are passed on to it."""

    def __init__(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Start `command`. Its keeper ends it when we end, however that comes about."""
        with tempfile.NamedTemporaryFile("wb", prefix="crepe-deploy-serve-", suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self.process = subprocess.Popen(
                [sys.executable, "-IS", str(_KEEPER), *command], stdin=subprocess.PIPE, stdout=log,
                stderr=subprocess.STDOUT, env=variables, start_new_session=True,
            )  # fmt: skip
        self.stopping = False
        self.started = time.monotonic()

    @contextlib.contextmanager
    def stopped_at_exit(self) -> Iterator[None]:
        """Pass signals on while inside; on leaving, end whatever still runs. nohup's ignoring of hang-ups is kept."""
        before = {number: signal.signal(number, self._pass_on) for number in _SIGNALS}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._pass_on)
        try:
            yield
        finally:
            self.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: Any) -> None:
        self.stopping = True
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def wait_until_healthy(self, url: str, timeout_s: float, say: Say = unsaid) -> bool:
        """True when it answers; False when a signal stopped it first. Raises ServeError with the end of its log.

        say: told every NEWS_S seconds how long it takes already, of how long at most, and what it is busy with.
        """
        end, news = time.monotonic() + timeout_s, NEWS_S
        while not healthy(url):
            if (waited := time.monotonic() - self.started) > news:
                say(f"not ready after {waited:.0f} s of at most {timeout_s:g} s; {self.busy_with()}")
                news = waited + NEWS_S
            if self.stopping:
                return False
            if self.process.poll() is not None:
                raise ServeError(f"the server ended with {self.how_it_ended()} before it was ready\n{self.tail()}")
            if time.monotonic() > end:
                raise ServeError(f"the server was not ready after {timeout_s:g} s\n{self.tail()}")
            time.sleep(POLL_S)
        return True

    def wait(self) -> None:
        """Until a signal comes, or the server ends by itself: then ServeError."""
        while not self.stopping:
            self.check_running()
            time.sleep(POLL_S)

    def check_running(self) -> None:
        """Raise ServeError when it has ended by itself."""
        if self.process.poll() is not None and not self.stopping:
            raise ServeError(f"the server ended by itself with {self.how_it_ended()}\n{self.tail()}")

    def stop(self) -> None:
        """Ask it to end and wait; then have its keeper end it, and all that it started."""
        if self.process.poll() is None:
            if not self.stopping:
                self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
        if self.process.stdin is not None:
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KEEPER_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):  # where the keeper was killed
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def how_it_ended(self) -> str:
        """Its exit code, and the signal that it stands for."""
        code = self.process.returncode
        number = -code if code < 0 else code - 128
        names = {int(known): known.name for known in signal.Signals}
        return f"code {code} ({names[number]})" if number in names else f"code {code}"

    def tail(self) -> str:
        """The last lines of its log, and where the rest is."""
        try:
            lines = self._end_of_log()
        except OSError as error:
            return f"its log cannot be read: {error}"
        return "\n".join([f"the end of {self.log}:", *(f"  {line}" for line in lines[-TAIL_LINES:])])

    def busy_with(self) -> str:
        """The phase its log shows, or else the last line that says something, its end left off where it is long."""
        try:
            lines = self._end_of_log()
        except OSError as error:
            return f"its log cannot be read: {error}"
        if (known := phase(lines)) is not None:
            return f"it is {known}"
        last = (telling(lines) or ["nothing yet"])[-1]
        line = "".join(char for char in last if char.isprintable()).strip()
        return f"its log says: {line if len(line) <= LINE_CHARS else f'{line[:LINE_CHARS]}...'}"

    def _end_of_log(self) -> list[str]:
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            return log.read().decode(errors="replace").splitlines()
