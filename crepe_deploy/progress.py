"""Progress on stderr: a bar with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

LINE_EVERY_S = 10.0


class Progress(Protocol):
    """Called after each piece of work with how many pieces are done and how many there are."""

    def __call__(self, done: int, total: int) -> None: ...


Show = Callable[[str], AbstractContextManager[Progress]]  # wraps a long step, named by a label; `progress` is one
Say = Callable[[str], None]  # receives one line for a person


def silent(done: int, total: int) -> None:
    """Progress that shows nothing."""


@contextmanager
def hidden(label: str) -> Iterator[Progress]:
    """Show nothing."""
    yield silent


def unsaid(line: str) -> None:
    """Say nothing."""


def ticker(step: Progress, total: int) -> Callable[[], None]:
    """A call for each finished piece of work, `total` of them in all the phases that share it."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        step(min(done, total), total)

    return tick


@contextmanager
def progress(label: str, *, quiet: bool = False) -> Iterator[Progress]:
    """Yield a `Progress` that shows `label`, the share done and the time left."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bar(label) as step:
            yield step
    else:
        yield _lines(label)


@contextmanager
def _bar(label: str) -> Iterator[Progress]:
    from rich import progress as bar
    from rich.console import Console

    columns = (
        bar.TextColumn("{task.description}"),
        bar.BarColumn(),
        bar.MofNCompleteColumn(),
        bar.TimeElapsedColumn(),
        bar.TextColumn("left"),
        bar.TimeRemainingColumn(),
    )
    with bar.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=None)

        def step(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield step


def _lines(label: str) -> Progress:
    start = last = time.monotonic()

    def step(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= LINE_EVERY_S:
            last = now
            left = (now - start) * (total - done) / max(done, 1)
            print(f"{label}: {done}/{total}, {now - start:.0f} s, {left:.0f} s left", file=sys.stderr, flush=True)

    return step
