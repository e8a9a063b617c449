"""The command line: the commands, assembled, and what becomes of their errors."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from . import __version__
from .commands.cache import cache_command
from .commands.doctor import doctor_command
from .commands.evaluate import eval_command
from .commands.experts import experts_command
from .commands.export import export_command
from .commands.heal import heal_command
from .commands.inspect import inspect_command
from .commands.options import say
from .commands.plan import plan_command
from .commands.prune import prune_command
from .commands.prune_and_export import prune_and_export_command
from .commands.search import search_command
from .commands.tyr import tyr_command
from .commands.verify import verify_command
from .errors import EXIT_INTERRUPTED, GPU_IS_FULL, CrepeError, InputError, Stopped
from .option_groups import SummedGroup
from .project import project_url
from .store.files import to_json

EXAMPLES = """\b
Examples:
  crepe-deploy plan models/llama
  crepe-deploy prune-and-export models/llama --sparsity 16:32 --calib wiki.txt --format dense,packed --out out
  crepe-deploy eval out/packed --text wiki.test.txt --against models/llama
"""


@click.group(cls=SummedGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES)
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Before the command: show where an unexpected error came from.")
def cli(debug: bool) -> None:  # `run` reads it: errors may come before parsing
    """Prune language models after training; export, prove and measure the result.

    Exit codes: 0 done, 1 tool error, 2 usage or invalid input, 3 gate failed, 4 gate inconclusive,
    75 stopped and resumable, 130 stopped with nothing left behind.
    """


for command in (
    prune_and_export_command,
    prune_command,
    tyr_command,
    experts_command,
    heal_command,
    export_command,
    eval_command,
    plan_command,
    doctor_command,
    cache_command,
    inspect_command,
    verify_command,
    search_command,
):
    cli.add_command(command)


def add_outer_commands() -> None:
    """Add the commands that live outside the core; their modules import nothing heavy."""
    from .bench.commands.bench import bench_command
    from .bench.commands.gate import gate_command
    from .bench.commands.report import report_command
    from .serve.command import serve_command

    for command in (bench_command, gate_command, report_command, serve_command):
        cli.add_command(command)


def interrupt_on_signals() -> None:
    """SIGTERM and SIGHUP end this process as Ctrl-C does; workers that a library forks from it die of them silently.

    A SIGHUP that is ignored, as under nohup, stays so.
    """
    owner = os.getpid()

    def interrupt(number: int, _frame: Any) -> NoReturn:
        if os.getpid() != owner:
            os._exit(128 + number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, interrupt)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; every failure is one line on stderr, with --json a document too.

    The context's object is the command as a person would type it.
    """
    add_outer_commands()
    as_json = "--json" in arguments
    typed = shlex.join(["crepe-deploy", *arguments])
    try:
        if odd := next((one for one in arguments if not _is_utf8(one)), None):
            raise InputError(f"{odd!r:.80} is not UTF-8, which everything that is written here is: rename it")
        return int(cli(list(arguments), prog_name="crepe-deploy", standalone_mode=False, obj=typed) or 0)
    except CrepeError as error:
        line = str(error) if isinstance(error, Stopped) else f"error: {error}"
        return fail(error, str(error), error.exit_code, line, as_json=as_json and not error.printed)
    except click.ClickException as error:
        error.show()
        return fail(error, error.format_message(), error.exit_code, "", as_json=as_json)
    except (KeyboardInterrupt, click.Abort) as stop:
        line = str(stop.__cause__ or "") or "stopped; nothing was left behind"  # click makes an Abort of an interrupt
        return fail(KeyboardInterrupt(), line, EXIT_INTERRUPTED, line, as_json=as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what reads our output has left: nobody to tell
        return CrepeError.exit_code
    except Exception as error:  # noqa: BLE001 - the one place where anything may arrive
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            reason = f"{error.filename!s:.80}... is too long for the name of a file: give a shorter one"
            return fail(InputError(), reason, InputError.exit_code, as_json=as_json)
        if type(error).__name__ == GPU_IS_FULL:
            reason = "the GPU has too little memory for this: give fewer or shorter windows, or --device cpu"
            return fail(CrepeError(), reason, CrepeError.exit_code, as_json=as_json)
        return report_unexpected(error, typed, debug="--debug" in arguments[:1], as_json=as_json)


def _is_utf8(argument: str) -> bool:
    """Whether an argument was UTF-8; Python keeps bytes that were not as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in argument)


def fail(
    error: BaseException, reason: str, code: int, line: str | None = None, *, as_json: bool, **more: str
) -> int:  # fmt: skip
    """Say why a command failed, and return its exit code: one line on stderr, and as JSON one document on stdout.

    line: in place of "error: REASON"; empty where stderr has been told.
    """
    if line != "":
        say(line or f"error: {reason}")
    if as_json:
        with contextlib.suppress(OSError):  # stdout that cannot be written to: stderr has been told
            click.echo(to_json({"error": reason, "code": code, "kind": type(error).__name__, **more}))
    return code


def report_unexpected(error: Exception, typed: str, *, debug: bool, as_json: bool) -> int:
    """The last line of defence: one line on what nobody foresaw, and a file with the details; with `debug` here too."""
    details = "".join(traceback.format_exception(error))
    if debug:
        say(details)
    reason = " ".join(str(error).split())[:200]
    line = f"unexpected {type(error).__name__}" + (f": {reason}" if reason else "")
    more = {}
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="backslashreplace", prefix="crepe-deploy-", suffix=".txt", delete=False
        ) as file:
            file.write(f"crepe-deploy {__version__}, Python {sys.version}\n{typed}\n\n{details}")
    except OSError:
        line += "; this is a defect of crepe-deploy; crepe-deploy --debug COMMAND shows where it came from"
    else:
        more = {"details": file.name}
        line += f"; this is a defect of crepe-deploy: please report it at {project_url('Issues')} with {file.name}"
    return fail(error, line, CrepeError.exit_code, as_json=as_json, **more)


def main() -> NoReturn:
    """The program: its arguments, its signals, its exit code."""
    interrupt_on_signals()
    sys.exit(run(sys.argv[1:]))
