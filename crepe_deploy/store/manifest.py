"""`manifest.json`: what a checkpoint is, where it came from, how it was made, what was measured, and its hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crepe_deploy.errors import VerifyError

from .checkpoint import read_json
from .files import write_json

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
_LIBRARIES = ("torch", "transformers", "safetensors", "numpy")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Record):
    """The checkpoint that was read.

    kind: "folder", "hub" or "gguf". revision: the hub's commit. files: sha256 by file name.
    notes: what a reader must know, for example that a GGUF file was dequantised.
    """

    kind: str
    id: str
    revision: str | None = None
    files: dict[str, str]
    license: str | None = None
    notes: dict[str, str] = Field(default_factory=dict)


class TensorRecord(_Record):
    """One pruned tensor: asked pattern, counted zeros, and the relative error of its layer's output.

    transposed: stored (in, out), as GPT-2 does. shape: as stored.
    layer_error: ||(W - W')D||_F / ||W D||_F, with D the norms of the input channels where the method collected
    them (`layer_error_weighting` "input-norm") and the identity otherwise ("none"). None where it was pruned elsewhere
    ("unknown").
    """

    shape: tuple[int, int]
    transposed: bool = False
    pattern: str
    zeros: int
    sparsity: float
    layer_error: float | None = None
    layer_error_weighting: str
    notes: dict[str, float] = Field(default_factory=dict)


class Manifest(_Record):
    """The whole record. `metrics` hold numbers with their conventions; `files` sha256 by relative path."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    format: str
    versions: dict[str, str]
    source: Source
    config: dict[str, Any]
    calibration: dict[str, Any] | None = None
    tensors: dict[str, TensorRecord] = Field(default_factory=dict)
    dense_tensors: list[str] = Field(default_factory=list)
    metrics: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    parent: str | None = None


def versions() -> dict[str, str]:
    """Versions of this tool, Python and the libraries that decide the result."""
    found = {"crepe-deploy": importlib.metadata.version("crepe-deploy"), "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(root: Path, progress: Callable[[str], None] | None = None) -> dict[str, str]:
    """sha256 by relative path of every file below `root`, the manifest left out."""
    hashes = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != MANIFEST_NAME):
        name = path.relative_to(root).as_posix()
        if progress is not None:
            progress(name)
        hashes[name] = sha256_file(path)
    return hashes


def save_manifest(root: Path, manifest: Manifest) -> None:
    """Write `root/manifest.json` atomically."""
    write_json(root / MANIFEST_NAME, manifest.model_dump(mode="json"))


def load_manifest(root: Path) -> Manifest:
    """Read and check `root/manifest.json`. Raises CheckpointError (missing, no JSON) or VerifyError (wrong content)."""
    content = read_json(root / MANIFEST_NAME)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise VerifyError(
            f"{root / MANIFEST_NAME} has schema version {version}; this crepe-deploy reads version {SCHEMA_VERSION}"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise VerifyError(f"{root / MANIFEST_NAME} is not a valid manifest: {error}") from error


def verify(root: Path, progress: Callable[[str], None] | None = None) -> Manifest:
    """Compare every file below `root` with the manifest. Raises VerifyError naming the first file that differs."""
    manifest = load_manifest(root)
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {MANIFEST_NAME}
    for name in sorted(manifest.files.keys() - found):
        raise VerifyError(f"{root / name} is in the manifest and missing on disk")
    for name in sorted(found - manifest.files.keys()):
        raise VerifyError(f"{root / name} is on disk and not in the manifest")
    for name, expected in manifest.files.items():
        if progress is not None:
            progress(name)
        if sha256_file(root / name) != expected:
            raise VerifyError(f"{root / name} differs from its sha256 in the manifest")
    return manifest
