"""The one error tree. Every error a user can meet derives from `CrepeError` and carries its exit code.

CrepeError                 1  the tool failed
├── InputError             2  the caller gave something that cannot work
│   ├── ConfigError           an option, preset or combination of options
│   ├── PatternError          a sparsity pattern that is unknown or does not fit a tensor
│   ├── CheckpointError       a model folder or file that is missing, damaged or unsafe
│   │   └── NoTokenizer           a model folder without a tokenizer that can be used, where text is needed
│   ├── UnsupportedModel      a model whose structure is not handled; says what is missing
│   ├── CalibrationError      calibration or evaluation text that is missing, unreadable or too short
│   ├── OutputError           an output path that exists, equals the input or cannot be written
│   └── MissingExtra          an optional dependency is not installed; names the install command
├── NumericalError         1  a computation that cannot be continued (Cholesky, NaN)
├── DiskFullError          1  the disk has no room for what must be written
├── ParityError            1  what was written does not compute what was meant
├── VerifyError            1  a file differs from its manifest
├── KernelError            1  a native kernel could not be built or run
├── ServeError             1  a server did not start, answer or agree
├── Stopped               75  stopped by the user; the same command goes on with --resume
├── GateInvalid            1  what a regression gate was given cannot be compared
├── GateFailed             3  a regression gate failed
└── GateInconclusive       4  a regression gate could not decide

Besides these, exit code 130 means stopped by Ctrl-C, SIGTERM or SIGHUP with nothing left behind, and 75 (EX_TEMPFAIL)
means stopped but resumable.
"""

from __future__ import annotations

from typing import ClassVar, Final

EXIT_RESUMABLE: Final = 75
EXIT_INTERRUPTED: Final = 130
GPU_IS_FULL: Final = "OutOfMemoryError"  # what torch calls its error, by name, for this imports no torch


class CrepeError(Exception):
    """Root of every error raised on purpose; `exit_code` is what the command line returns.

    printed: the command's JSON document is on stdout already, and a second one must not follow.

    Fix: read the line behind `error:`; it names what failed.
    """

    exit_code: ClassVar[int] = 1
    printed: bool = False


class InputError(CrepeError):
    """The caller gave something that cannot work.

    Fix: change what the line names; nothing was written.
    """

    exit_code = 2


class ConfigError(InputError):
    """An option, a preset or a combination of options is invalid.

    Fix: compare the option with the command's `--help`.
    """


class PatternError(InputError):
    """A sparsity pattern is unknown or does not fit a tensor.

    Fix: take N:M with M up to 32 that divides the layer's inputs, or a fraction such as 0.5.
    """


class CheckpointError(InputError):
    """A model folder or file is missing, damaged or unsafe.

    Fix: fetch the model again, or name the folder that holds its config.json.
    """


class NoTokenizer(CheckpointError):
    """A model folder has no tokenizer, or one that needs code from the checkpoint.

    Fix: put the model's tokenizer files into the folder.
    """


class UnsupportedModel(InputError):
    """A model's structure is not handled; the message says what is missing.

    Fix: take a model that docs/architectures.md lists.
    """


class CalibrationError(InputError):
    """Calibration or evaluation text is missing, unreadable or too short.

    Fix: give a longer text, or fewer or shorter windows (`--calib-samples`, `--calib-length`).
    """


class OutputError(InputError):
    """An output path exists, equals the input or cannot be written.

    Fix: take another `--out`, or `--overwrite` where crepe-deploy wrote what is there.
    """


class MissingExtra(InputError):
    """An optional dependency is not installed; the message names the install command.

    Fix: run the pip command that the message names.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        verb = "are" if " and " in package else "is"
        super().__init__(f"{purpose} needs {package}, which {verb} not installed: pip install 'crepe-deploy[{extra}]'")


class NumericalError(CrepeError):
    """A computation cannot be continued.

    Fix: compute in float32 (`--dtype float32`), calibrate on more or other text, or leave the layer out
    (`--exclude`).
    """


class DiskFullError(CrepeError):
    """The disk has no room for what must be written.

    Fix: make room, or name an `--out` on another disk.
    """


class ParityError(CrepeError):
    """What was written does not compute what was meant.

    Fix: look into what is kept in `OUT.failed`, and report it; do not ship it.
    """


class VerifyError(CrepeError):
    """A file differs from its manifest.

    Fix: fetch or export the folder again.
    """


class KernelError(CrepeError):
    """A native kernel could not be built or run.

    Fix: see `crepe-deploy doctor`: it says which compiler or library is missing.
    """


class ServeError(CrepeError):
    """A server did not start, answer or agree.

    Fix: read the end of the server's log behind the message; give vLLM less context (`--max-model-len`) or memory.
    """


class Stopped(CrepeError):
    """The user stopped a run that can be gone on with.

    Fix: the same command with `--resume`.
    """

    exit_code = EXIT_RESUMABLE


class GateInvalid(CrepeError):
    """What a regression gate was given cannot be compared: errors, mismatches, budgets below the noise.

    Fix: measure again under one set of conditions, or widen budgets that lie below the noise.
    """


class GateFailed(CrepeError):
    """A regression gate failed.

    Fix: the change is worse than the budget allows: look at the report.
    """

    exit_code = 3


class GateInconclusive(CrepeError):
    """A regression gate could not decide.

    Fix: measure more rounds.
    """

    exit_code = 4
