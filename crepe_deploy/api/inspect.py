"""`inspect`: what a folder's tensors really hold, by counting."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from crepe_deploy.errors import InputError
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.families import family_of
from crepe_deploy.moe.layers import layers_if_any
from crepe_deploy.packed.config import QUANT_METHOD, PackedConfig
from crepe_deploy.progress import Say, unsaid
from crepe_deploy.store.audit import audit, inspect_folder, recorded
from crepe_deploy.store.checkpoint import read_config, require_folder
from crepe_deploy.store.gguf_headers import headers_of
from crepe_deploy.store.sources import Model, gguf_file, require_pinned
from crepe_deploy.store.stock import check_tokenizer
from crepe_deploy.store.values import read_values
from crepe_deploy.structural.check import describe

from .inputs import find_model


class TensorRow(TypedDict):
    """One tensor as counted.

    pattern: the one that its manifest records where the count confirms it, else the finest N:M that every group of the
    input dimension holds, or None. pattern_from: "manifest", or "zeros" where it comes from counting alone. sparsity:
    zeros over entries. Of a GGUF file, of which the header alone is read, dtype is the storage type and zeros, sparsity
    and pattern are None. axis: of an ONNX initialiser, the one reduced. packed: the weight is stored without its zeros;
    shape and counts are the dense weight's. values: "int8" or "int4:group=128" where the folder has scales of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    zeros: int | None
    sparsity: float | None
    pattern: str | None
    pattern_from: str | None
    axis: NotRequired[int | None]
    packed: NotRequired[bool]
    values: NotRequired[str]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` counted.

    layers: the widths of each layer where layers may differ, else None. damage: why the folder's tokenizer does not
    work, or None. experts: of a mixture whose files this can walk, `moe.layers.ExpertLayers.record`.
    """

    folder: Path
    tensors: list[TensorRow]
    layers: list[dict[str, Any]] | None
    damage: str | None = None
    experts: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What the command prints with --json."""
        layers = {"layers": self.layers} if self.layers else {}
        damage = {"damage": self.damage} if self.damage else {}
        experts = {"experts": self.experts} if self.experts else {}
        return {"folder": str(self.folder), "tensors": self.tensors, **layers, **damage, **experts}


def inspect(folder: str | Path, *, revision: str | None = None, say: Say | None = None) -> Inspection:
    """Count the zeros of every tensor in a checkpoint or ONNX folder, one in memory at a time.

    folder: or a hub id (`revision`: its branch, tag or commit), or a GGUF file, whose tensors are listed, not counted.
    Raises CheckpointError (exit code 2) for a folder that is none, MissingExtra (2) for ONNX without its libraries.
    """
    from crepe_deploy.exporting.onnx.inspect import inspect_onnx, is_onnx

    if (file := gguf_file(str(folder))) is not None:
        require_pinned(revision, Model(file, "gguf", str(file), None, {}))
        return Inspection(file, _gguf_rows(file, say or unsaid), None)
    root = find_model(folder, revision, say).folder
    require_folder(root)
    if is_onnx(root):
        return Inspection(root, cast(list[TensorRow], inspect_onnx(root)), None, _damage(root))
    rows = _packed_rows(root) if _is_packed(root) else _dense_rows(root)
    return Inspection(root, rows, describe(root), _damage(root), _experts(root))


def _gguf_rows(file: Path, say: Say) -> list[TensorRow]:
    """What the header says of each tensor."""
    with headers_of(file) as headers:
        tensors = [tensor for reader in headers.readers for tensor in reader.tensors]
        if not headers.whole:
            say(f"{file} is not whole yet: listed from its header")
        say("zeros are not counted in a GGUF file; they can be in what prune makes of it (crepe-deploy cache lists it)")
        return [
            {
                "name": tensor.name,
                "shape": tuple(int(size) for size in reversed(tensor.shape)),
                "dtype": tensor.tensor_type.name,
                "zeros": None,
                "sparsity": None,
                "pattern": None,
                "pattern_from": None,
            }
            for tensor in tensors
        ]


def _experts(root: Path) -> dict[str, Any] | None:
    kind = read_config(root).get("model_type") if (root / "config.json").is_file() else None
    if not isinstance(kind, str) or family_of(kind).experts is None:
        return None
    try:
        layers = layers_if_any(Decoder(root, experts=True))
    except InputError:
        return None  # quantised files, for example: their tensors are listed all the same
    return None if layers is None else layers.record()


def _damage(root: Path) -> str | None:
    try:
        check_tokenizer(root)
    except InputError as error:
        return str(error)
    return None


def _is_packed(root: Path) -> bool:
    quantization = read_config(root).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def _dense_rows(root: Path) -> list[TensorRow]:
    rows, values = cast(list[TensorRow], inspect_folder(root)), read_values(root)
    return [{**row, "values": str(values[row["name"]][0])} if row["name"] in values else row for row in rows]


def _packed_rows(root: Path) -> list[TensorRow]:
    """The tensors of a packed folder as the dense ones that they stand for."""
    from crepe_deploy.exporting.formats.unpacking import unpacked

    records, values = recorded(root), PackedConfig.from_dict(read_config(root)["quantization_config"]).values
    more = {"packed": True} | ({} if values is None else {"values": str(values)})
    rows = []
    for name, tensor, packed in unpacked(root):
        row = asdict(audit(name, tensor, records.get(name)))
        rows.append(cast(TensorRow, row | more if packed else row))
    return rows
