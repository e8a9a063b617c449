"""Progress: one estimate, said as a bar or as lines, by a clock that the test moves."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crepe_deploy.progress import (
    BEAT_S,
    LINE_S,
    QUIET_S,
    Estimate,
    Later,
    Lines,
    Meter,
    going_on,
    part,
    parts,
    progress,
)
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.texts import calibration_windows, load_tokenizer
from tests.pico import make_pico_llama, sample_text


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_estimate_says_elapsed_as_elapsed_and_the_rest_at_the_same_pace() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    clock.now += 94
    assert estimate.words() == "0:01:34 elapsed" and estimate.left is None
    estimate.done, estimate.total = 1, 4
    assert estimate.words() == "25%, 0:01:34 elapsed, about 0:04:42 left"


def test_what_was_done_before_took_no_time_of_this() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines("healing", stream, clock)
    clock.now += 40  # models are loaded
    going_on(lines, 90)
    lines(90, 100)
    clock.now += LINE_S
    lines(95, 100)
    assert stream.getvalue().splitlines()[-1] == "healing: 95%, 0:01:10 elapsed, about 0:00:30 left"
    going_on(lambda done, total: None, 90)  # told to nobody


@pytest.mark.parametrize("told", [True, False])
def test_the_time_left_after_resuming_rests_on_what_was_done_since(told: bool) -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines("exporting", stream, clock)
    meter = Meter(lines if told else Later(None).step(lines), 100)
    for _ in range(7):
        clock.now += 1
        meter.before()
    assert stream.getvalue().splitlines()[-1] == "exporting: 5%, 0:00:05 elapsed"  # the pace is not yet known
    clock.now += LINE_S
    meter()
    assert stream.getvalue().splitlines()[-1] == "exporting: 8%, 0:00:37 elapsed, about 0:46:00 left"
    meter.reach(54, before=True)
    clock.now += LINE_S
    meter()
    assert stream.getvalue().splitlines()[-1] == "exporting: 55%, 0:01:07 elapsed, about 0:22:30 left"


def test_a_line_at_the_start_one_with_an_estimate_within_seconds_and_then_not_too_many() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines("pruning", stream, clock)
    assert stream.getvalue() == "pruning: started\n"
    for second in range(1, 71):
        clock.now += 1
        lines(second, 1000)
    said = stream.getvalue().splitlines()[1:]
    assert said[0] == "pruning: 0%, 0:00:05 elapsed, about 0:16:35 left"
    assert [re.findall(r"\S+ elapsed", line) for line in said] == [
        ["0:00:05 elapsed"],
        ["0:00:35 elapsed"],
        ["0:01:05 elapsed"],
    ]


def test_a_line_a_minute_comes_whatever_the_work_does() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = Lines("pruning", stream, clock)
    for _ in range(int(3 * QUIET_S)):
        clock.now += BEAT_S
        lines.beat()
    assert stream.getvalue().splitlines()[1:] == [f"pruning: 0:0{minute}:00 elapsed" for minute in (1, 2, 3)]


def test_each_part_has_its_name_and_its_own_estimate_and_the_end_says_how_long_all_took() -> None:
    clock, stream = Clock(), io.StringIO()
    with progress("pruning model", stream=stream, clock=clock) as step:
        clock.now += 50
        with parts(step)("pruning to 2:4") as inner:
            clock.now += 10
            inner(1, 2)
    assert stream.getvalue().splitlines() == [
        "pruning model: started",
        "pruning to 2:4: started",
        "pruning to 2:4: 50%, 0:00:10 elapsed, about 0:00:10 left",
        "pruning model: done, 0:01:00 elapsed",
    ]


def test_a_call_of_ones_own_is_told_of_every_part() -> None:
    told: list[tuple[int, int]] = []

    def step(done: int, total: int) -> None:
        told.append((done, total))

    part(step, "pruning")(1, 2)
    with parts(step)("exporting") as inner:
        inner(2, 2)
    assert told == [(1, 2), (2, 2)]


def test_what_fails_does_not_say_that_it_is_done() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="no"), progress("pruning", stream=stream):
        raise ValueError("no")
    assert stream.getvalue() == "pruning: started\n"


def test_what_is_refused_before_its_work_begins_says_nothing() -> None:
    stream, said = io.StringIO(), list[str]()
    later = Later(said.append)
    with pytest.raises(ValueError, match="no"), progress("pruning", waits=True, stream=stream) as step:
        later.step(step)
        later.show(None)
        later("computing on cpu")
        raise ValueError("no")
    assert (stream.getvalue(), said) == ("", [])


@pytest.mark.parametrize("by", ["part", "piece", "show"])
def test_what_is_kept_is_said_when_the_work_begins(by: str) -> None:
    stream = io.StringIO()
    later = Later(lambda line: print(line, file=stream))
    with progress("pruning model", waits=True, stream=stream, clock=Clock()) as shown:
        step = later.step(shown)
        later("computing on cpu")
        if by == "part":
            part(step, "pruning to 2:4")
        elif by == "piece":
            step(1, 2)
        else:
            with later.show(parts(shown))("pruning to 2:4"):
                later("more")
        later("later")
    begun = [] if by == "piece" else ["pruning to 2:4: started"]
    more = ["more"] if by == "show" else []
    end = ["later", "pruning model: done, 0:00:00 elapsed"]
    assert stream.getvalue().splitlines() == ["computing on cpu", *begun, *more, *end]


def test_a_call_of_ones_own_is_told_before_it_what_was_kept() -> None:
    told: list[Any] = []
    later = Later(told.append)
    step = later.step(lambda done, total: told.append((done, total)))
    later("computing on cpu")
    going_on(step, 1)
    assert told == []
    step(1, 2)
    assert told == ["computing on cpu", (1, 2)]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("pruning", quiet=True) as step:
        step(1, 2)
    assert capsys.readouterr() == ("", "")


def test_the_bar_says_what_the_lines_say() -> None:
    clock, stream = Clock(), Terminal()
    with progress("pruning to 16:32, recipe best", stream=stream, clock=clock) as step:
        clock.now += 94
        step(1, 4)
    shown = stream.getvalue()
    assert "pruning to 16:32, recipe best" in shown and "25%, 0:01:34 elapsed, about 0:04:42 left" in shown
    assert shown.endswith("pruning to 16:32, recipe best: done, 0:01:34 elapsed\n")


def test_unequal_pieces_make_a_whole() -> None:
    told: list[tuple[int, int]] = []
    meter = Meter(lambda done, total: told.append((done, total)), 100)
    share = meter.share(50)
    for done in (1, 2, 3):
        share(done, 3)
    meter.add(25)
    meter.reach(100)
    assert told == [(17, 100), (33, 100), (50, 100), (75, 100), (100, 100)]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "magnitude"},
        {"method": "wanda", "feed": "pruned"},
        {"method": "ria", "allocate": "owl"},
        {"recipe": "best"},
        {"method": "ria", "repair": "block:steps=4,windows=1"},
        {"method": "magnitude", "include": r"\.1\.mlp\.up_proj"},
    ],
    ids=str,
)
def test_a_run_is_told_of_work_inside_every_block_and_never_backwards(options: dict[str, str], tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model")
    text = tmp_path / "calib.txt"
    text.write_text(sample_text(3000), encoding="utf-8")
    told: list[tuple[int, int]] = []
    prune(
        resolve_model(str(model)),
        tmp_path / "out",
        prune_config(pattern="2:4", **options),  # type: ignore[arg-type]
        calibration_windows(text, load_tokenizer(model), 8, 32, seed=0),
        step=lambda done, total: told.append((done, total)),
    )
    assert len({total for _, total in told}) == 1 and told[-1][0] == told[-1][1]
    dones = [done for done, _ in told]
    assert dones == sorted(dones)
    if "include" not in options:
        assert len(set(dones)) > 4 * 2, "ticks inside the blocks"


def test_a_terminal_shows_what_is_done_elapsed_and_left(tmp_path: Path) -> None:
    """A real run under a pseudo-terminal; what it prints in the end stays readable."""
    model = make_pico_llama(tmp_path / "model")
    text = tmp_path / "calib.txt"
    text.write_text(sample_text(3000), encoding="utf-8")
    main, side = pty.openpty()
    command = [sys.executable, "-m", "crepe_deploy", "prune", str(model), "--recipe", "best", "--calib", str(text)]
    with subprocess.Popen(
        [*command, "--calib-samples", "8", "--calib-length", "32", "--out", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL, stderr=side, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    ) as process:  # fmt: skip
        os.close(side)
        shown = b""
        while chunk := _read(main):
            shown += chunk
        assert process.wait() == 0, shown
    os.close(main)
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    label = "pruning to 16:32, recipe best (ria, permute fold, reconstruct admm, rescale logits)"
    assert label in said and re.search(r"\d+%, 0:\d\d:\d\d elapsed, about 0:\d\d:\d\d left", said), said
    assert re.search(re.escape(f"pruning {model}") + r": done, 0:\d\d:\d\d elapsed\s*$", said), said


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""  # the other side is closed
