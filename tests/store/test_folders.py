"""Output folders: whole or not at all, at nobody's cost, whatever kills the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from crepe_deploy.errors import DiskFullError, OutputError
from crepe_deploy.store.files import require_disk
from crepe_deploy.store.folders import (
    DERIVED,
    Claim,
    atomic_folder,
    check_output,
    foreign,
    free_name,
    scratch_folder,
)
from crepe_deploy.store.signals import Uninterrupted
from crepe_deploy.store.temporary import temporary_folder
from tests.faults.strikes import environment


def write_ours(folder: Path, text: str) -> Path:
    """A folder as this tool writes it: one file, and the manifest that lists it."""
    folder.mkdir()
    (folder / "weights").write_text(text)
    manifest = {"versions": {"crepe-deploy": "0.1.0"}, "files": {"weights": "hash"}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def tree(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing_not_even_parents(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "made" / "here" / "out") as folder:
        (folder / "half").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_what_was_to_be_overwritten(tmp_path: Path) -> None:
    write_ours(tmp_path / "out", "old")
    with pytest.raises(ValueError), atomic_folder(tmp_path / "out", overwrite=True):
        raise ValueError
    assert (tmp_path / "out" / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_success_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    write_ours(tmp_path / "out", "old")
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("y")
    assert tree(tmp_path) == {"out/new": "y"}


@pytest.mark.parametrize("suffix", [".partial", ".old"])
def test_a_folder_of_somebody_else_that_bears_a_working_name_is_refused_and_kept(tmp_path: Path, suffix: str) -> None:
    write_ours(tmp_path / "out", "old")
    other = tmp_path / f"out{suffix}"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="was not made by a run"), atomic_folder(tmp_path / "out", overwrite=True):
        pass
    assert tree(tmp_path) == before


def test_a_recorded_name_that_holds_another_folder_by_now_is_kept(tmp_path: Path) -> None:
    with Claim(tmp_path / "out") as claim:
        claim.make(tmp_path / "out.partial")
    (tmp_path / "out.partial").rename(tmp_path / "kept")  # the inode stays with it
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "theirs").write_text("x")
    with pytest.raises(OutputError, match="was not made by a run"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out.partial" / "theirs").read_text() == "x"


def test_the_second_writer_is_refused_at_once_and_harms_nothing(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(OutputError, match="another run is writing"), atomic_folder(tmp_path / "out"):
            pass
    assert tree(tmp_path) == {"out/file": "first"}


def test_only_what_this_tool_wrote_is_replaced_and_the_rest_is_named(tmp_path: Path) -> None:
    write_ours(tmp_path / "out", "old")
    check_output(tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"did not write \(notes\.txt\)"):
        check_output(tmp_path / "out", overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(OutputError, match=r"a\.jpg"), atomic_folder(tmp_path / "photos", overwrite=True):
        pass
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_the_report_of_several_formats_accounts_for_their_folders(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text(json.dumps({"versions": {"crepe-deploy": "0.1.0"}}))
    write_ours(out / "dense", "x")
    assert foreign(out) == []
    (out / "dense" / "extra").write_text("x")
    (out / "link").symlink_to(tmp_path)
    assert foreign(out) == ["dense/extra", "link"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"versions": 3}', '{"versions": {"other": "1"}}', "[" * 100_000])
def test_a_manifest_that_is_none_of_ours_makes_nothing_ours(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    assert foreign(tmp_path) == ["manifest.json"]


def test_output_rules(tmp_path: Path) -> None:
    model = write_ours(tmp_path / "model", "x")
    with pytest.raises(OutputError, match="--overwrite"):
        check_output(model, overwrite=False)
    for out in (model, model / "inside", tmp_path):
        with pytest.raises(OutputError, match="one folder or lie inside"):
            check_output(out, overwrite=True, inputs=(model,))
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a folder"):
        check_output(tmp_path / "file", overwrite=True)
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(OutputError, match="is a link"):
        check_output(tmp_path / "link", overwrite=True)


@pytest.mark.parametrize("suffix", DERIVED)
def test_an_input_that_bears_a_working_name_of_the_output_is_refused(tmp_path: Path, suffix: str) -> None:
    model = write_ours(tmp_path / f"out{suffix}", "x")
    with pytest.raises(OutputError, match="works in"):
        check_output(tmp_path / "out", overwrite=True, inputs=(model,))


def test_the_folder_in_which_a_command_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ours(tmp_path / "here", "x")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="runs in"):
        check_output(Path(), overwrite=True)


def test_too_small_a_disk_is_refused_beforehand(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="GB free"):
        require_disk(tmp_path / "not" / "yet", 1 << 60)


KILLED = """
import signal, sys
from pathlib import Path
from crepe_deploy.store.folders import atomic_folder

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background process inherits as ignored
with atomic_folder(Path(sys.argv[1]) / "out", overwrite=True) as folder:
    (folder / "weights").write_text("new")
    (folder / "manifest.json").write_text('{"versions": {"crepe-deploy": "1"}, "files": {"weights": "hash"}}')
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_killed_at_any_file_event_the_next_run_finds_the_old_or_the_new_whole(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Every file call below the output is struck in turn, until a run gets through."""
    for event in range(1, 200):
        root = tmp_path / str(event)
        root.mkdir()
        write_ours(root / "out", "old")
        strike = {"STRIKE_ROOT": str(tmp_path), "STRIKE_AT": str(event), "STRIKE_WITH": str(int(number))}
        command = [sys.executable, "-c", KILLED, str(root)]
        code = subprocess.run(command, capture_output=True, check=False, env=environment() | strike).returncode
        if number == signal.SIGINT:
            assert [path.name for path in root.iterdir()] == ["out"]  # tidied by the run itself
        with Claim(root / "out") as claim:
            claim.recover()
        assert (root / "out" / "weights").read_text() in ("old", "new")
        assert sorted(path.name for path in root.iterdir()) == ["out"]
        assert foreign(root / "out") == []
        if code == 0:
            break
    assert event > 8 and (root / "out" / "weights").read_text() == "new"


def test_the_record_is_private_to_its_output(tmp_path: Path) -> None:
    (tmp_path / ".out.crepe-deploy").write_text(json.dumps({"folders": {"../elsewhere": [1, 2], "out.old": ["x"]}}))
    write_ours(tmp_path / "elsewhere", "x")
    with atomic_folder(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
    assert (tmp_path / "elsewhere" / "weights").exists()


def test_a_scratch_folder_goes_at_the_end_and_takes_nobody_elses(tmp_path: Path) -> None:
    place = tmp_path / "out.unpacked"
    with pytest.raises(KeyboardInterrupt), scratch_folder(place) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    place.mkdir()
    (place / "theirs").write_text("x")
    with pytest.raises(OutputError, match="was not made by a run"), scratch_folder(place):
        pass
    assert tree(tmp_path) == {"out.unpacked/theirs": "x"}


def test_a_scratch_folder_of_a_killed_run_goes_with_the_next(tmp_path: Path) -> None:
    place = tmp_path / "out.unpacked"
    with Claim(place) as claim:
        claim.make(place)  # and the process is killed here
    with scratch_folder(place) as folder:
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_record_left_inside_is_not_published(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / ".pruned.crepe-deploy").write_text("{}")  # where its unlink failed
        (folder / "weights").write_text("x")
    assert tree(tmp_path) == {"out/weights": "x"}


@pytest.mark.parametrize("below", ["", "below"])
def test_links_in_a_circle_are_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out, inputs in ((tmp_path / "loop" / below, ()), (tmp_path / "out", (tmp_path / "loop" / below,))):
        with pytest.raises(OutputError, match="loop"):
            check_output(out, overwrite=False, inputs=inputs)


def test_what_is_kept_for_a_look_takes_a_name_that_is_free(tmp_path: Path) -> None:
    assert free_name(tmp_path / "out.failed") == tmp_path / "out.failed"
    (tmp_path / "out.failed").mkdir()
    (tmp_path / "out.failed-2").symlink_to("nowhere")
    assert free_name(tmp_path / "out.failed") == tmp_path / "out.failed-3"


def test_temporary_folders_of_killed_runs_go_and_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f"crepe-deploy-test-x-{ended.pid}"
    left.mkdir()
    (left / "half").write_text("x")
    (tmp_path / f"other-{ended.pid}").mkdir()
    (tmp_path / f"crepe-deploy-test-link-{ended.pid}").symlink_to(tmp_path / f"other-{ended.pid}")
    with temporary_folder("test") as one, temporary_folder("test") as other:
        assert one.is_dir() and other.is_dir() and one != other
        assert not left.exists()
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == ["crepe", "other"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_waits_also_where_another_thread_would_take_it(number: signal.Signals) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    over, before = threading.Event(), signal.signal(number, stop)
    other = threading.Thread(target=over.wait)
    other.start()
    done = []
    try:
        with pytest.raises(KeyboardInterrupt), Uninterrupted() as signals:
            os.kill(os.getpid(), number)
            done.append("kept from it")
            with pytest.raises(KeyboardInterrupt), signals.delivered():
                done.append("never")
            os.kill(os.getpid(), number)
            done += [str(sum(range(10**6)))]
        assert done == ["kept from it", "499999500000"] and signal.getsignal(number) is stop
    finally:
        signal.signal(number, before)
        over.set()
        other.join()
