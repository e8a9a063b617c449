"""A fork server around the real command line: the libraries are imported once, each command runs in a child of its own.

A child has limits (memory above what it started with, processor seconds, file size), a stdin full of "y", and a scratch
folder. A hang is 20 s of its own processor time, or of sleep: a busy machine makes neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import importlib
import os
import pkgutil
import re
import resource
import select
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import crepe_deploy
from crepe_deploy import cli

OWN_SECONDS = 20  # what a hang is: so much of its own processor time, or asleep for so long
MEMORY = 2 << 30  # above what a child starts with
NOBODY = 65534
_FILE_BYTES = 1 << 29
_EXPECTED = {0, 1, 2, 3, 4, 75, 130}
_UNEXPECTED = re.compile(r"error: unexpected|Traceback \(most recent call last\)")


@dataclass
class Outcome:
    """What became of one command."""

    argv: list[str]
    code: int  # the exit code, or minus the signal that ended it
    stderr: str
    stdout: str
    details: str  # the traceback that the last line of defence wrote
    seconds: float  # of the child's own processor time
    memory: int  # bytes above what it started with
    hung: bool
    defects: list[str] = field(default_factory=list)

    @property
    def message(self) -> str:
        """The last line on stderr, without what changes from run to run."""
        line = (self.stderr.strip() or "-").splitlines()[-1]
        return re.sub(r"'[^']*'|\"[^\"]*\"|/\S+|-?\d[\d.e+]*", "_", line)[:120]


def import_everything() -> None:
    """Import all of the product and what its commands import when they run, so that children start with it."""
    for module in pkgutil.walk_packages(crepe_deploy.__path__, "crepe_deploy."):
        if not re.search(r"__main__|studies|bench\.gpu|cuda|vllm|browser", module.name):
            importlib.import_module(module.name)


def warm(commands: Sequence[Sequence[str]], scratch: Path) -> None:
    """Run commands in children, and import here what each of them imported there; they leave a filled cache."""
    os.environ["XDG_CACHE_HOME"] = str(scratch / "cache")
    scratch.mkdir(exist_ok=True)
    for argv in commands:
        names = scratch / "modules"
        pid = os.fork()
        if pid == 0:
            _redirect(scratch)
            with contextlib.suppress(BaseException):
                cli.run(list(argv))
            names.write_text("\n".join(sys.modules))
            os._exit(0)
        os.waitpid(pid, 0)
        for name in names.read_text().splitlines():
            if name not in sys.modules and not name.startswith("torch._inductor"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
    for folder, _, files in os.walk(scratch / "cache") if os.getuid() == 0 else ():
        for name in (".", *files):
            os.chown(os.path.join(folder, name), NOBODY, NOBODY)  # noqa: PTH118
    gc.collect()
    gc.freeze()


def run_in_child(
    argv: Sequence[str],
    scratch: Path,
    *,
    need: int = 0,
    before: Callable[[], None] | None = None,
    nobody: bool = False,
    own_seconds: int = OWN_SECONDS,
) -> Outcome:
    """Run one command in a child that sees `scratch`/cwd, tmp and home; need: bytes that it may use besides MEMORY.

    before: called in the child, last before the command. nobody: where root runs this, without root's rights.
    """
    nobody = nobody and os.getuid() == 0
    for name in ("cwd", "tmp", "home"):
        (scratch / name).mkdir(exist_ok=True)
        if nobody:
            os.chown(scratch / name, NOBODY, NOBODY)
    for details in (scratch / "tmp").glob("crepe-deploy-*.txt"):
        details.unlink()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(list(argv), scratch, need, before, nobody, own_seconds)
    hung = _wait(pid, own_seconds)
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    outcome = Outcome(
        list(argv),
        code,
        _text(scratch / "stderr"),
        _text(scratch / "stdout"),
        "".join(_text(path) for path in sorted((scratch / "tmp").glob("crepe-deploy-*.txt"))),
        usage.ru_utime + usage.ru_stime,
        max(0, usage.ru_maxrss * 1024 - int(_text(scratch / "base") or 0)),
        hung or code == -signal.SIGXCPU,
    )
    _end_group(pid, outcome)
    _judge(outcome, need)
    return outcome


def _judge(outcome: Outcome, need: int) -> None:
    if outcome.hung:
        outcome.defects.append("hang")
    elif outcome.code < 0 or outcome.code not in _EXPECTED:
        outcome.defects.append(f"exit {outcome.code}")
    if outcome.details or _UNEXPECTED.search(outcome.stderr):
        outcome.defects.append("traceback")
    if outcome.memory > need + MEMORY:
        outcome.defects.append("memory")


def _child(
    argv: list[str], scratch: Path, need: int, before: Callable[[], None] | None, nobody: bool, own_seconds: int
) -> None:
    code = 70
    try:
        os.setsid()
        (scratch / "base").write_text(str(_resident()))
        _redirect(scratch)
        os.chdir(scratch / "cwd")
        os.environ.update(HOME=str(scratch / "home"), TMPDIR=str(scratch / "tmp"))
        tempfile.tempdir = None
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + need + MEMORY, size + need + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (own_seconds, own_seconds + 5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (_FILE_BYTES, _FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        sys.argv = ["crepe-deploy", *argv]
        if nobody:
            _become_nobody()
        if before:
            before()
        cli.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - a child says what it died of
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become_nobody() -> None:
    """Give up root's rights but that of reading, without which the libraries in root's home could not be imported."""
    system = ctypes.CDLL(None, use_errno=True)
    system.prctl(8, 1)  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    read_search = 1 << 2  # CAP_DAC_READ_SEARCH
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if system.capset(version, (ctypes.c_uint32 * 6)(read_search, read_search, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")
    system.prctl(4, 1)  # PR_SET_DUMPABLE, or its own /proc/self is closed to it


def _redirect(scratch: Path) -> None:
    """The child's three streams: "y" without end, two files."""
    pipe, feed = os.pipe()
    os.set_blocking(feed, False)
    with contextlib.suppress(BlockingIOError):
        os.write(feed, b"y\n" * 2000)
    os.dup2(pipe, 0)
    os.close(pipe)
    os.close(feed)
    for number, name in ((1, "stdout"), (2, "stderr")):
        handle = os.open(scratch / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115


def _wait(pid: int, own_seconds: int) -> bool:
    """Wait until the child has ended; one that sleeps for `own_seconds` without a moment's work is killed: True."""
    handle = os.pidfd_open(pid)
    slept, worked = 0.0, -1.0
    try:
        while not select.select([handle], [], [], 1.0)[0]:
            state, work = _state(pid)
            slept = slept + 1 if state in "SD" and work == worked else 0.0
            worked = work
            if slept >= own_seconds:
                os.killpg(pid, signal.SIGKILL)
                return True
        return False
    finally:
        os.close(handle)


def _state(pid: int) -> tuple[str, float]:
    """A process's state, and the processor time that it and the ended ones below it have had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(int(part) for part in fields[11:15])
    for other in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parts = other.read_text().rpartition(")")[2].split()
            if str(pid) in (parts[1], parts[3]):  # its child, or of its session: what it started works for it
                own += int(parts[11]) + int(parts[12])
    return fields[0], own


def _end_group(pid: int, outcome: Outcome) -> None:
    """End what a command left running, which is a defect."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, 0)
        time.sleep(0.2)  # what it told to end may still be ending
        os.killpg(pid, signal.SIGKILL)
        outcome.defects.append("left a process running")


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _text(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        data = file.read(1 << 20)
    return data.decode("utf-8", "replace")


def fingerprint(root: Path) -> dict[str, str]:
    """What lies below a folder: kind, mode and content of every name; of links where they point."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)  # noqa: PTH118
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)  # noqa: PTH115
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:  # noqa: PTH123
                    content = hashlib.blake2b(file.read(), digest_size=12).hexdigest()
            else:
                content = ""
            found[os.path.relpath(path, root)] = f"{status.st_mode:o} {content}"
    return found
