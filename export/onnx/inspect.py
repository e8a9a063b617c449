"""What an exported graph's initialisers really hold, counted along the axis that each matrix product reduces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import CheckpointError
from ...extras import require
from ...serve.ort import GRAPH_NAME, is_onnx
from ...store.audit import TensorAudit, count_zeros, named_pattern, recorded
from ...store.checkpoint import require_inside
from ...store.reading import read_bytes

__all__ = ["GRAPH_NAME", "inspect_onnx", "is_onnx", "load_graph", "matrices"]

GRAPH_BYTES: Final = 1 << 31  # more than protobuf holds
INT4_ZERO: Final = 8  # the code of zero in a symmetric MatMulNBits weight
BLOCK: Final = re.compile(r"(^|\.)layers\.\d+\.")  # a name inside a decoder block
_MATRIX_OPS: Final = ("MatMul", "Gemm", "MatMulNBits")
_DTYPES: Final = {"FLOAT": "float32", "FLOAT16": "float16", "UINT8": "uint8"}


def inspect_onnx(folder: Path) -> list[dict[str, Any]]:
    """One row for every matrix weight and table of the graph, as `audit.inspect_folder` gives, `axis` besides.

    axis: of the stored initialiser that the product reduces, along which a pattern must hold; None where none does.
    The manifest's pattern goes before the counted one; a genai graph has names of its own, so the blocks' matrices are
    asked for the one that all were pruned to. Raises CheckpointError, MissingExtra.
    """
    records = recorded(folder)
    patterns = {record.pattern for record in records.values()}
    shared = next(iter(patterns)) if len(patterns) == 1 else None
    rows = []
    try:
        for audit, axis, weight in matrices(folder):
            inside = shared if BLOCK.search(audit.name) else None
            stated = records[audit.name].pattern if audit.name in records else inside
            pattern, origin = named_pattern(weight, stated) if axis is not None else (None, None)
            rows.append({**vars(audit), "pattern": pattern, "pattern_from": origin, "axis": axis})
        return rows
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / GRAPH_NAME} is damaged, or no graph of a model: {error}") from error


def matrices(folder: Path) -> Iterator[tuple[TensorAudit, int | None, Tensor]]:
    """Audit (of no pattern), reduction axis and weight (out, in) of each large initialiser, one in memory at a time.

    A 4-bit weight is given as codes less their zero, so that zeros are zeros. Raises CheckpointError, MissingExtra.
    """
    model = load_graph(folder)
    users = _matrix_users(model.graph)
    for tensor in model.graph.initializer:
        node, axis = users.get(tensor.name, (None, None))
        if len(tensor.dims) < 2 or (node is None and _element(tensor) not in ("FLOAT", "FLOAT16")):
            continue
        stored = _read(folder, tensor)
        if node is not None and node.op_type == "MatMulNBits":
            weight: Tensor = _codes(stored, node, tensor.name)
            kind = "int4"
        else:
            weight = torch.from_numpy(stored.T if axis == 0 else stored).contiguous()
            kind = _DTYPES.get(_element(tensor), _element(tensor).lower())
        zeros = count_zeros(weight)
        shape = tuple(int(extent) for extent in tensor.dims)
        yield TensorAudit(tensor.name, shape, kind, zeros, zeros / max(weight.numel(), 1), None), axis, weight


def load_graph(folder: Path) -> Any:
    """The graph of a folder without its external weights. Raises CheckpointError, MissingExtra."""
    require("reading an ONNX folder", "onnx")
    import onnx
    from google.protobuf.message import DecodeError

    path = folder / GRAPH_NAME
    try:
        model = onnx.load_model_from_string(read_bytes(path, limit=GRAPH_BYTES))
    except DecodeError as error:
        raise CheckpointError(f"{path} is no ONNX graph: {error}") from error
    if not model.graph.node:
        raise CheckpointError(f"{path} is no ONNX graph: it has no operators")
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _external(folder, tensor)
    return model


def _external(folder: Path, tensor: Any) -> tuple[Path, dict[str, str]]:
    """The file beside the graph that holds an initialiser, and what the graph says of its place. CheckpointError."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = place.get("location", "")
    if location in ("", ".", "..") or Path(location).name != location:  # nothing outside the folder is read
        raise CheckpointError(f"{folder / GRAPH_NAME}: '{tensor.name}' lies in another folder: {location}")
    require_inside(folder, folder / location)
    if not (folder / location).is_file():
        raise CheckpointError(f"{folder / location} is missing: it holds '{tensor.name}'")
    return folder / location, place


def _matrix_users(graph: Any) -> dict[str, tuple[Any, int | None]]:
    """By initialiser: the product that reads it as its second factor, and the stored axis that is reduced."""
    transposed = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Transpose"}
    found: dict[str, tuple[Any, int | None]] = {}
    for node in graph.node:
        if node.op_type not in _MATRIX_OPS:
            continue
        name = node.input[1]
        if node.op_type == "MatMulNBits":
            found[name] = (node, 1)
        elif name in transposed:
            found[transposed[name]] = (node, 1)
        else:
            found[name] = (node, 1 if node.op_type == "Gemm" and attribute(node, "transB") else 0)
    return found


def attribute(node: Any, name: str) -> int:
    """An integer attribute of a node, 0 where it is not given."""
    return next((int(each.i) for each in node.attribute if each.name == name), 0)


def _element(tensor: Any) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(tensor.data_type))


def _read(folder: Path, tensor: Any) -> npt.NDArray[Any]:
    """The values of an initialiser, from the file that it names or from the graph. Raises CheckpointError."""
    import onnx

    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return np.array(onnx.numpy_helper.to_array(tensor))
    path, place = _external(folder, tensor)
    kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    shape = tuple(int(extent) for extent in tensor.dims)
    try:
        flat = np.fromfile(path, kind, int(np.prod(shape)), offset=int(place.get("offset", 0)))
        return flat.reshape(shape)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold '{tensor.name}': {error}") from error


def _codes(packed: npt.NDArray[np.uint8], node: Any, name: str) -> Tensor:
    """The codes (out, in) of a MatMulNBits weight (out, blocks, bytes) less their zero, low half of each byte first."""
    if attribute(node, "bits") != 4 or (len(node.input) > 3 and node.input[3]):
        raise CheckpointError(f"'{name}': only symmetric 4-bit weights are counted")
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    return torch.from_numpy(codes.astype(np.int8)[:, : attribute(node, "K")] - INT4_ZERO)
