"""What the studies share: options of their command lines, a pruned folder for a while, what they print and write."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from ...pruning.config import PruneConfig
from ...pruning.prune import prune
from ...store.files import write_json, write_text
from ...store.manifest import versions
from ...store.sources import resolve_model
from ...texts import CalibrationSet
from ..assets import DEFAULT_DIR

CALIBRATION: Final = ("--calib-samples", "16", "--calib-length", "512", "--seed", "0")
PATH: Final = click.Path(path_type=Path)

Command = TypeVar("Command", bound=Callable[..., None])


def assets_option(command: Command) -> Command:
    """`--assets`: where the model and the texts are kept."""
    return click.option("--assets", "assets_dir", type=PATH, default=DEFAULT_DIR, show_default=True)(command)


def out_option(default: str | None = None) -> Callable[[Command], Command]:
    """`--out`: the results file."""
    path = None if default is None else Path(default)
    return click.option("--out", type=PATH, default=path, show_default=True, help="Write the results here as JSON.")


def folder_option(default: str) -> Callable[[Command], Command]:
    """`--folder`: where checkpoints are built."""
    return click.option("--folder", type=PATH, default=Path(default), show_default=True)


def say(message: str) -> None:
    """One line of progress, on stderr."""
    click.echo(message, err=True)


def save(result: Any, out: Path | None, shown: Any = None) -> None:
    """Print the results (or the part of them to be shown) as JSON, and write them where that is wanted."""
    click.echo(json.dumps(result if shown is None else shown, indent=2))
    if out is not None:
        write_json(out, result)


def publish(page: str, path: Path | None) -> None:
    """Print a page, and write it where it is wanted."""
    click.echo(page)
    if path is not None:
        write_text(path, page)


def machine() -> dict[str, Any]:
    """What speeds and sizes belong to."""
    return {"processor": platform.machine(), "cores": os.cpu_count(), **versions()}


@contextmanager
def pruned(model: Path, config: PruneConfig, calibration: CalibrationSet | None) -> Iterator[Path]:
    """A folder with the pruned model, as long as it is looked at."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        prune(resolve_model(str(model)), out, config, calibration)
        yield out
