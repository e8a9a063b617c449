"""`manifest.json`: what a checkpoint is, where it came from, how it was made, what was measured, and its hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crepe_deploy.errors import CheckpointError, VerifyError

from .checkpoint import require_inside
from .files import disk_errors, write_json
from .reading import open_file, read_object, refuse_folder_of_models

MANIFEST_NAME = "manifest.json"
LINEAGE = "lineage"
SCHEMA_VERSION = 1
_Size = Annotated[int, Field(gt=0)]
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

    transposed: stored (in, out), as GPT-2 does. shape: as stored; the matrices of many experts one behind the other.
    layer_error: ||(W - W')D||_F / ||W D||_F, with D the norms of the input channels where the method collected
    them (`layer_error_weighting` "input-norm") and the identity otherwise ("none"). None where it was pruned elsewhere
    ("unknown").
    """

    shape: tuple[_Size, _Size] | tuple[_Size, _Size, _Size]
    transposed: bool = False
    pattern: str
    zeros: int
    sparsity: float
    layer_error: float | None = None
    layer_error_weighting: str
    notes: dict[str, float] = Field(default_factory=dict)

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in); of many experts all rows, one expert's below the other's."""
        *experts, rows, columns = self.shape[:-2] + (self.shape[:-3:-1] if self.transposed else self.shape[-2:])
        return math.prod(experts) * rows, columns

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Raise VerifyError where the tensor is stored with another shape."""
        if tuple(shape) != self.shape:
            raise VerifyError(f"manifest.json says that '{name}' is {self.shape}, and it is stored as {tuple(shape)}")

    def recounted(self, name: str, zeros: int, shape: Sequence[int]) -> TensorRecord:
        """This with the zeros as they are stored now: rounding adds some. Raises VerifyError for another shape."""
        self.check_shape(name, shape)
        return self.model_copy(update={"zeros": zeros, "sparsity": zeros / math.prod(self.shape)})


class Manifest(_Record):
    """The whole record.

    metrics: numbers with their conventions. files: sha256 by relative path. parent: sha256 of the manifest that this
    one came from, which lies in the folder as `lineage/SHA256.json`.
    """

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
    known = {"crepe-deploy": importlib.metadata.version("crepe-deploy"), "python": platform.python_version()}
    return known | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def sha256_file(path: Path) -> str:
    """Hex sha256 of a regular file, read in pieces. Raises CheckpointError."""
    with open_file(path) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def hash_folder(root: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """sha256 by relative path of every file below `root`, the manifest left out.

    known: of files that were read already, so that they are not read again.
    """
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    known = known or {}
    return {name: known.get(name) or sha256_file(root / name) for name in names if name != MANIFEST_NAME}


def save_manifest(root: Path, manifest: Manifest) -> None:
    """Write `root/manifest.json` atomically."""
    write_json(root / MANIFEST_NAME, manifest.model_dump(mode="json"))


def load_manifest(root: Path) -> Manifest:
    """Read and check `root/manifest.json`. Raises CheckpointError (missing, no JSON) or VerifyError (wrong content)."""
    path = root / MANIFEST_NAME
    if root.is_dir() and not path.exists():
        refuse_folder_of_models(root)
        raise CheckpointError(
            f"{path} is missing: crepe-deploy did not write this folder; `crepe-deploy prune` makes one of it, and "
            f"`export --format packed` and int8 take it as it is"
        )
    return read_manifest(path)


def read_manifest(path: Path) -> Manifest:
    """`load_manifest` of one file, an ancestor's under `lineage/` among them."""
    content = read_object(path)
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise VerifyError(f"{path} has schema version {version}; this crepe-deploy reads version {SCHEMA_VERSION}")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise VerifyError(f"{path} is not a valid manifest: {error}") from error


def verify(root: Path) -> Manifest:
    """Compare every file below `root` with the manifest, and follow its parents through `lineage/`.

    Raises VerifyError naming the first file that differs, or the ancestor that is not there.
    """
    manifest = load_manifest(root)
    present, wrong = _present(root)
    for name in sorted(manifest.files.keys() - present):
        raise VerifyError(wrong.get(name, f"{root / name} is in the manifest and missing on disk"))
    for name in sorted(present - manifest.files.keys()):
        raise VerifyError(f"{root / name} is on disk and not in the manifest")
    if wrong:
        raise VerifyError(next(iter(wrong.values())))
    for name, expected in manifest.files.items():
        if sha256_file(root / name) != expected:
            raise VerifyError(f"{root / name} differs from its sha256 in the manifest")
    ancestors(root, manifest)
    return manifest


def _present(root: Path) -> tuple[set[str], dict[str, str]]:
    """The names of all files below `root`, and by name what is wrong with the rest; the hub's own are left out."""
    names, wrong = set(), {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if name in (".gitattributes", ".cache") or f"{name}/".startswith(".cache/huggingface/"):
            continue
        try:
            require_inside(root, path)
        except CheckpointError as error:
            wrong[name] = str(error)
            continue
        if path.is_file():
            names.add(name)
        elif not path.is_dir() or path.is_symlink():
            wrong[name] = f"{path} is neither a file nor a folder"
        elif not any(path.iterdir()):
            wrong[name] = f"{path} is an empty folder, which no manifest names"
    return names - {MANIFEST_NAME}, wrong


def ancestors(root: Path, manifest: Manifest) -> list[Manifest]:
    """The manifests that the one of `root` came from, parent first, out of `root/lineage/`.

    A manifest written before there was a lineage names a parent and carries none: there the chain ends. Raises
    VerifyError where a parent is missing, or is another manifest than its hash says.
    """
    chain: list[Manifest] = []
    while manifest.parent is not None and any(name.startswith(f"{LINEAGE}/") for name in manifest.files):
        path = root / lineage_name(manifest.parent)
        if not path.is_file():
            raise VerifyError(f"{path} is missing: it is the parent of what was written by '{manifest.stage}'")
        if sha256_file(path) != manifest.parent:
            raise VerifyError(f"{path} is another manifest than its name says")
        manifest = read_manifest(path)
        chain.append(manifest)
    return chain


def lineage_name(digest: str) -> str:
    """Where an exported folder carries the ancestor whose manifest has this sha256."""
    return f"{LINEAGE}/{digest}.json"


def inherit(source: Path, folder: Path, files: Mapping[str, str] | None = None) -> str | None:
    """Give `folder` the manifest of `source` and all that came before it, as `lineage/`; returns the manifest's sha256.

    files: sha256 by name of what was read, where `source` was not verified. None, and nothing written, where `source`
    has no manifest or is no longer what that says: a model that was made elsewhere. Raises DiskFullError.
    """
    if not (source / MANIFEST_NAME).is_file():
        return None
    if files is not None:
        try:
            recorded = load_manifest(source).files
        except (CheckpointError, VerifyError):
            return None  # another tool's file of that name
        if not files.items() <= recorded.items():
            return None
    digest = sha256_file(source / MANIFEST_NAME)
    with disk_errors(folder):
        (folder / LINEAGE).mkdir(exist_ok=True)
        for path in sorted((source / LINEAGE).glob("*.json")):
            shutil.copyfile(path, folder / LINEAGE / path.name)
        shutil.copyfile(source / MANIFEST_NAME, folder / lineage_name(digest))
    return digest
