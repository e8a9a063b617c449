"""Models on the Hugging Face hub: fetched whole, or their configuration and the headers of their weight files alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from crepe_deploy.errors import CheckpointError

from .checkpoint import INDEX_NAME, SINGLE_NAME, indexed
from .files import disk_errors
from .outline import named, write_hole
from .reading import is_folder
from .temporary import temporary_folder

FILES: Final = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
]
CONFIG: Final = "config.json"
_MALFORMED: Final = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)  # of the hub's reader


def fetch(model: str, revision: str | None, say: Callable[[str], None]) -> Path:
    """The folder of a snapshot with all that is read of it. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    say(f"{_beside(model)}fetching {model} from the hub")
    with _asked(model):
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=FILES))
    return _configured(folder, model)


@contextmanager
def hub_outline(model: str, revision: str | None, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield a folder that stands for a model on the hub: its configuration, and weight files that are headers and
    holes. One whose weights are on this disk already is yielded as it lies there. CheckpointError, DiskFullError.
    """
    from huggingface_hub import HfApi, snapshot_download

    say(f"{_beside(model)}reading the configuration and the headers of {model} on the hub")
    with _asked(model):
        snapshot = Path(snapshot_download(model, revision=revision, allow_patterns=[CONFIG, INDEX_NAME]))
    several = (_configured(snapshot, model) / INDEX_NAME).is_file() and not (snapshot / SINGLE_NAME).is_file()
    names = indexed(snapshot) if several else [SINGLE_NAME]
    if all((snapshot / name).is_file() for name in names):
        yield snapshot
        return
    if several:
        with _asked(model):
            names = [SINGLE_NAME] if HfApi().file_exists(model, SINGLE_NAME, revision=snapshot.name) else names
    with temporary_folder("outline") as folder, named(folder, model):
        for name in (CONFIG, INDEX_NAME):
            if (snapshot / name).is_file():
                with disk_errors(folder):
                    shutil.copyfile(snapshot / name, folder / name)
        for name in names:
            write_hole(folder / name, _header(model, name, snapshot.name))
        yield folder


def _header(model: str, name: str, revision: str) -> dict[str, dict[str, Any]]:
    """The entries of a weight file's header, by tensor, as they are written there. Raises CheckpointError."""
    from huggingface_hub import HfApi

    try:
        with _asked(model):
            header = HfApi().parse_safetensors_file_metadata(model, name, revision=revision)
    except _MALFORMED as error:
        raise CheckpointError(f"{model}: the header of {name} on the hub is malformed: {error!r:.100}") from error
    fields = ("dtype", "shape", "data_offsets")
    return {tensor: {field: getattr(info, field) for field in fields} for tensor, info in header.tensors.items()}


def _configured(folder: Path, model: str) -> Path:
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{model} has no config.json on the hub; of a repository of GGUF files download one "
            f"(hf download {model} FILE.gguf) and give its path"
        )
    return folder


@contextmanager
def _asked(model: str) -> Iterator[None]:
    """Inside, what the hub and the way to it say becomes a CheckpointError."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: that of whichever client it has
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        SafetensorsParsingError,
    )

    known = (HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError, SafetensorsParsingError, OSError)
    try:
        yield
    except known as error:
        raise CheckpointError(f"{_beside(model)}{_refusal(model, error)}") from error


def _beside(model: str) -> str:
    """What lies here in the folder that the hub id MODEL would be in were it a path; "" where there is none."""
    folder = Path(model).parent
    if not is_folder(folder) or not os.access(folder, os.R_OK | os.X_OK):
        return ""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return f"the folder {folder} here has no {Path(model).name} (it has {', '.join(names[:5]) or 'no folders'}); "


def _refusal(model: str, error: Exception) -> str:
    """That `model` is not here and the hub did not give it, why, and what to do."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, LocalEntryNotFoundError):
        reason = (
            f"it cannot be reached ({error.__cause__ or reason}); give a folder of this disk: where there is a network "
            f"`hf download {model} --local-dir DIR` fills one, and HF_ENDPOINT names a mirror"
        )
    return f"model '{model}' is no folder on this disk, and the hub did not give it: {reason}"
