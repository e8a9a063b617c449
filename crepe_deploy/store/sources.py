"""Where a model comes from: a local folder, a GGUF file (dequantised), or a hub id with its revision pinned."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crepe_deploy.errors import CheckpointError, ConfigError
from crepe_deploy.machine import cache_dir

from .cache import GGUF_CACHE
from .checkpoint import shard_paths
from .gguf_split import parts_of
from .hub import fetch
from .manifest import Source, sha256_file
from .reading import read_front_matter, refuse_folder_of_models, refuse_lost_link
from .temporary import remove_abandoned

_NO_NAME = ("", "null", "Null", "NULL", "~")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Model:
    """A model folder on this disk and how it came there. `folder` is what every later step reads."""

    folder: Path
    kind: str
    id: str
    revision: str | None
    notes: dict[str, str]


def resolve_model(model: str, revision: str | None = None, say: Callable[[str], None] = lambda _: None) -> Model:
    """Find MODEL on this disk, downloading or converting it where needed. Raises CheckpointError, ConfigError."""
    if (file := gguf_file(model)) is not None:
        return _from_gguf(file, say)
    path = Path(model).expanduser()
    if path.is_dir():
        return Model(path, "folder", str(path), None, {})
    if path.exists():
        raise CheckpointError(f"{path} is neither a model folder nor a .gguf file")
    refuse_lost_link(path, CheckpointError)
    if not is_hub_id(model):
        raise CheckpointError(f"model '{model}' is no folder on this disk and no hub id of the form owner/name")
    folder = fetch(model, revision, say)
    return Model(folder, "hub", model, folder.name, {})


def gguf_file(model: str) -> Path | None:
    """The GGUF file that MODEL names: the file itself, or the one in a folder that holds no other model, as
    `export --format gguf` writes it. None for everything else. Raises CheckpointError, also where there are several,
    and where a folder is no model and holds models."""
    try:
        path = Path(model).expanduser()
        folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that nobody has
        raise CheckpointError(f"model '{model:.80}' cannot be looked for: {error}") from error
    if not folder and path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        return path
    files = sorted(path.glob("*.gguf")) if folder and not (path / "config.json").exists() else []
    if files and files != parts_of(files[0]):
        raise CheckpointError(f"{path} holds {len(files)} GGUF files: name one of them, for example {files[0]}")
    if folder and not files:
        refuse_folder_of_models(path)
    return files[0] if files else None


def is_hub_id(name: str) -> bool:
    """Whether this has the form of a hub id, owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def is_model_name(model: str) -> bool:
    """Whether this names a model that is no folder: a GGUF file on this disk, or a hub id where no file is in its way.

    A name of one part never is a hub id, nor is one that ends as a scenario does.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        return path.is_file()
    return path.suffix not in (".yaml", ".yml", ".json") and not os.path.lexists(path) and is_hub_id(model)


def _from_gguf(path: Path, say: Callable[[str], None]) -> Model:
    from .gguf import convert_gguf, hash_gguf

    digest = hash_gguf(path)
    folder = cache_dir() / GGUF_CACHE / digest
    remove_abandoned(folder.parent, "[0-9a-f]" * 64 + ".partial-*")
    if not folder.is_dir():
        say(f"dequantising {path.name} (once; kept in {folder})")
        convert_gguf(path, folder)
    notes = {"gguf": path.name, "gguf_sha256": digest, "weights": "dequantised from GGUF to bfloat16"}
    return Model(folder, "gguf", str(path), None, notes)


def describe_source(model: Model) -> Source:
    """Hash the files that were read and note the licence, for the manifest."""
    names = ["config.json", *(path.name for path in shard_paths(model.folder))]
    files = {name: sha256_file(model.folder / name) for name in names}
    return Source(
        kind=model.kind,
        id=model.id,
        revision=model.revision,
        files=files,
        license=read_license(model.folder),
        notes=model.notes,
    )


def read_license(folder: Path) -> str | None:
    """The licence that the front matter of a model card names, several joined by ", "; None where it names none."""
    card = folder / "README.md"
    stated = read_front_matter(card).get("license") if card.is_file() else None
    names = [
        name
        for name in (stated if isinstance(stated, list) else [stated])
        if isinstance(name, str) and name not in _NO_NAME
    ]
    return ", ".join(names) or None


def require_pinned(revision: str | None, model: Model) -> None:
    """Refuse a revision for a model that has none. Raises ConfigError."""
    if revision is not None and model.kind != "hub":
        raise ConfigError(f"--revision {revision} applies to hub ids only, and {model.id} is a {model.kind}")
