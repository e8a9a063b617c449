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


class CrepeError(Exception):
    """Root of every error raised on purpose; `exit_code` is what the command line returns.

    printed: the command's JSON document is on stdout already, and a second one must not follow.
    """

    exit_code: ClassVar[int] = 1
    printed: bool = False


class InputError(CrepeError):
    """The caller gave something that cannot work."""

    exit_code = 2


class ConfigError(InputError):
    """An option, a preset or a combination of options is invalid."""


class PatternError(InputError):
    """A sparsity pattern is unknown or does not fit a tensor."""


class CheckpointError(InputError):
    """A model folder or file is missing, damaged or unsafe."""


class NoTokenizer(CheckpointError):
    """A model folder has no tokenizer, or one that needs code from the checkpoint."""


class UnsupportedModel(InputError):
    """A model's structure is not handled; the message says what is missing."""


class CalibrationError(InputError):
    """Calibration or evaluation text is missing, unreadable or too short."""


class OutputError(InputError):
    """An output path exists, equals the input or cannot be written."""


class MissingExtra(InputError):
    """An optional dependency is not installed; the message names the install command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'crepe-deploy[{extra}]'")


class NumericalError(CrepeError):
    """A computation cannot be continued."""


class DiskFullError(CrepeError):
    """The disk has no room for what must be written."""


class ParityError(CrepeError):
    """What was written does not compute what was meant."""


class VerifyError(CrepeError):
    """A file differs from its manifest."""


class KernelError(CrepeError):
    """A native kernel could not be built or run."""


class ServeError(CrepeError):
    """A server did not start, answer or agree."""


class Stopped(CrepeError):
    """The user stopped a run that can be gone on with."""

    exit_code = EXIT_RESUMABLE


class GateInvalid(CrepeError):
    """What a regression gate was given cannot be compared: errors, mismatches, budgets below the noise."""


class GateFailed(CrepeError):
    """A regression gate failed."""

    exit_code = 3


class GateInconclusive(CrepeError):
    """A regression gate could not decide."""

    exit_code = 4
