"""Progress on stderr: what is done, the share done, the time it took and the time left.

On a terminal it is a bar, elsewhere plain lines: one at the start, more as the share grows, and one a minute at least,
whatever the work does. Both say the same words from one estimate. `Later` keeps what is said of work until it begins.
"""

from __future__ import annotations

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Final, Protocol, TextIO

FIRST_S: Final = 5.0  # until a first line with an estimate
LINE_S: Final = 30.0  # between lines, where there is news
QUIET_S: Final = 60.0  # without a line at most
BEAT_S: Final = 1.0  # between looks at the clock


class Progress(Protocol):
    """Called after each piece of work with how many pieces are done and how many there are."""

    def __call__(self, done: int, total: int) -> None: ...


Show = Callable[[str], AbstractContextManager[Progress]]  # wraps a long step, named by a label; `progress` is one
Say = Callable[[str], None]  # receives one line for a person
Clock = Callable[[], float]  # seconds


def silent(done: int, total: int) -> None:
    """Progress that shows nothing."""


@contextmanager
def hidden(label: str) -> Iterator[Progress]:
    """Show nothing."""
    yield silent


def unsaid(line: str) -> None:
    """Say nothing."""


def unheard(units: float) -> None:
    """Count nothing."""


class Meter:
    """Work of unequal pieces, in units of which there are `total` in all; `step` is told whole ones."""

    def __init__(self, step: Progress, total: int) -> None:
        self._step, self._total, self._done = step, total, 0.0

    def __call__(self) -> None:
        """One more unit is done."""
        self.add(1)

    def add(self, units: float, *, before: bool = False) -> None:
        """So many more units are done; before: they were before this start."""
        self.reach(self._done + units, before=before)

    def before(self) -> None:
        """One more unit was done before this start."""
        self.add(1, before=True)

    def reach(self, units: float, *, before: bool = False) -> None:
        """So many units are done in all; before: those that are new were before this start."""
        self._done, done = units, min(round(units), self._total)
        if before:
            going_on(self._step, done)
        self._step(done, self._total)

    def share(self, units: float) -> Progress:
        """What is told here of the pieces of one part comes to `units` of the whole at its end."""
        told = 0.0

        def step(done: int, total: int) -> None:
            nonlocal told
            self.add(units * done / total - told)
            told = units * done / total

        return step


class Later:
    """A `Say` that keeps its lines until work begins: of what is refused before that, nothing but the refusal is said.

    step, show: as given, and work begins with the first that they are told or wrap.
    """

    def __init__(self, say: Say | None) -> None:
        self._say, self._lines = say or unsaid, list[str]()
        self._begun = False

    def __call__(self, line: str) -> None:
        """Say the line, once work has begun."""
        self._lines.append(line)
        if self._begun:
            self.begin()

    def begin(self) -> None:
        """Say all that was kept."""
        self._begun = True
        for line in self._lines:
            self._say(line)
        self._lines.clear()

    def step(self, step: Progress | None) -> Progress:
        """A progress that begins the work."""
        return _Beginning(step or silent, self.begin)

    def show(self, show: Show | None) -> Show:
        """What wraps a long step, and begins the work."""

        def shown(label: str) -> AbstractContextManager[Progress]:
            self.begin()
            return (show or hidden)(label)

        return shown


class _Beginning:
    """A progress; `begin` is called before anything of it is shown or told."""

    def __init__(self, step: Progress, begin: Callable[[], None]) -> None:
        self.inner, self.begin = step, begin

    def __call__(self, done: int, total: int) -> None:
        self.begin()
        self.inner(done, total)


def part(step: Progress, label: str) -> Progress:
    """`step` for the next part of its work: a display shows `label` and estimates anew, another callable is told on."""
    if isinstance(step, _Beginning):
        step.begin()
        part(step.inner, label)
    elif isinstance(step, Display):
        step.begin(label)
    return step


def going_on(step: Progress, done: int) -> None:
    """`done` pieces are done; those that are new were before this start, and the pace is that of the others."""
    if isinstance(step, _Beginning):
        going_on(step.inner, done)
    elif isinstance(step, Display):
        step.go_on(done)


def parts(step: Progress | None) -> Show:
    """`part` as what wraps a long step; without `step` nothing is shown."""
    return lambda label: nullcontext(part(step or silent, label))


class Estimate:
    """The share of work done, the time it took, and the time that the rest will take at that pace.

    What was done before this start counts as done, and neither it nor the time spent on it as pace.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start = self._told = clock()
        self._before, self._before_s = 0, 0.0
        self.done = self.total = 0

    def tell(self, done: int, total: int) -> None:
        """`done` pieces of `total` are done."""
        self.done, self.total, self._told = done, total, self._clock()

    def go_on(self, done: int) -> None:
        """`done` pieces are done; what is new of them was before this start."""
        now = self._clock()
        self._before += done - self.done
        self._before_s += now - self._told
        self.done, self._told = done, now

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    @property
    def left(self) -> float | None:
        """Seconds, or None before anything is done from here."""
        done = self.done - self._before
        return (self.elapsed - self._before_s) * (self.total - self.done) / done if done > 0 else None

    def words(self) -> str:
        """All of it, as far as it is known."""
        share = f"{self.done / self.total:.0%}, " if self.total and self.done else ""
        left = "" if self.left is None else f", about {_clock_time(self.left)} left"
        return f"{share}{_clock_time(self.elapsed)} elapsed{left}"


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Display(ABC):
    """A `Progress` that a person sees."""

    def __init__(self, label: str, clock: Clock) -> None:
        self.label, self._clock, self.estimate = label, clock, Estimate(clock)
        self._whole, self._first = Estimate(clock), label

    def __call__(self, done: int, total: int) -> None:
        """`done` pieces of `total` are done."""
        self.estimate.tell(done, total)
        self.changed()

    def begin(self, label: str) -> None:
        """From here on it is about `label`, from nothing done."""
        self.label, self.estimate = label, Estimate(self._clock)
        self.began()

    def go_on(self, done: int) -> None:
        """`done` pieces are done; those that are new were before this start."""
        self.estimate.go_on(done)

    def end(self) -> str:
        """The last line, of all parts."""
        return f"{self._first}: done, {_clock_time(self._whole.elapsed)} elapsed"

    @abstractmethod
    def began(self) -> None:
        """Show the new label."""

    @abstractmethod
    def changed(self) -> None:
        """Show what is done."""


@contextmanager
def progress(
    label: str, *, quiet: bool = False, waits: bool = False, stream: TextIO | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[Progress]:  # fmt: skip
    """Yield a `Progress` that shows `label`, the share done, the time it took and the time left, on stderr.

    waits: no start is said before it is told of a part or a piece of the work, which may be refused until then.
    """
    place = sys.stderr if stream is None else stream
    if quiet:
        yield silent
    elif place.isatty():
        with _bar(label, place, clock) as bar:
            yield bar
    else:
        with _beating(Lines(label, place, clock, waits=waits)) as lines:
            yield lines


class Lines(Display):
    """Plain lines for logs."""

    def __init__(self, label: str, stream: TextIO, clock: Clock, *, waits: bool = False) -> None:
        super().__init__(label, clock)
        self._stream, self._lock = stream, threading.Lock()
        self._last, self._estimated = clock(), False
        if not waits:
            self.began()

    def began(self) -> None:
        """A line for what is begun."""
        with self._lock:
            self._estimated = False
            self._print(f"{self.label}: started")

    def changed(self) -> None:
        """A line when there was none for long, or none yet with an estimate."""
        with self._lock:
            if self._clock() - self._last >= (LINE_S if self._estimated else FIRST_S):
                self._estimated = True
                self._print(f"{self.label}: {self.estimate.words()}")

    def beat(self) -> None:
        """A line when there was none for too long; called again and again, by another thread."""
        with self._lock:
            if self._clock() - self._last >= QUIET_S:
                self._print(f"{self.label}: {self.estimate.words()}")

    def finish(self) -> None:
        """The last line."""
        with self._lock:
            self._print(self.end())

    def _print(self, line: str) -> None:
        self._last = self._clock()
        print(line, file=self._stream, flush=True)


@contextmanager
def _beating(lines: Lines) -> Iterator[Lines]:
    ended = threading.Event()

    def beat() -> None:
        try:
            while not ended.wait(BEAT_S):
                lines.beat()
        except (OSError, ValueError):
            return  # nobody reads any more: whoever prints next in the main thread will find out

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()
    lines.finish()


@contextmanager
def _bar(label: str, stream: TextIO, clock: Clock) -> Iterator[Display]:
    from rich import progress as rich
    from rich.console import Console
    from rich.text import Text

    class Words(rich.ProgressColumn):
        def render(self, task: rich.Task) -> Text:
            return Text(bar.estimate.words())

    class Bars(rich.Progress):
        def get_renderables(self) -> Iterator[Any]:
            yield Text(bar.label)
            yield self.make_tasks_table(self.tasks)

    class Bar(Display):
        def began(self) -> None:
            bars.reset(task, total=None)

        def changed(self) -> None:
            bars.update(task, completed=self.estimate.done, total=self.estimate.total)

    bar = Bar(label, clock)
    bars = Bars(rich.BarColumn(bar_width=24), Words(), console=Console(file=stream), transient=True)
    task = bars.add_task("", total=None)
    with bars:
        yield bar
    print(bar.end(), file=stream, flush=True)
