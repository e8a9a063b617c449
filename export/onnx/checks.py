"""Before the proof by numbers: the graph's own metadata, the ONNX checker, and shape inference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...errors import CheckpointError, ParityError
from ...store.files import disk_errors
from .inspect import GRAPH_NAME, load_graph

STANDARD_DOMAINS: Final = ("", "ai.onnx")
RUNTIME_DOMAIN: Final = "com.microsoft"


def finish_graph(folder: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Write `metadata` and inferred shapes into the graph, check it, and say what was checked.

    Raises ParityError naming what the checker found.
    """
    import onnx

    graph = load_graph(folder)
    for key, value in metadata.items():
        entry = next((each for each in graph.metadata_props if each.key == key), None) or graph.metadata_props.add()
        entry.key, entry.value = key, value
    del graph.graph.value_info[:]  # a builder's own notes on inner shapes may be wrong: they are inferred anew
    try:
        graph = onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)
        with disk_errors(folder):
            onnx.save(graph, folder / GRAPH_NAME)
        private = _check(folder, graph)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityError(f"{folder / GRAPH_NAME} is not a valid graph: {str(error).strip()[:500]}") from error
    known = {value.name for value in [*graph.graph.value_info, *graph.graph.input, *graph.graph.output]}
    standard = [node for node in graph.graph.node if node.domain in STANDARD_DOMAINS]
    without = sum(name not in known for node in standard for name in node.output if name)
    return {
        "ir_version": graph.ir_version,
        "opsets": {each.domain or "ai.onnx": each.version for each in graph.opset_import},
        "nodes": len(graph.graph.node),
        "checker": "passed, full",
        "checked_as_unknown": private,
        "shape_inference": "passed, strict",
        "standard_operators_without_shape": without,
        "other_operators": sorted({node.op_type for node in graph.graph.node if node.domain not in STANDARD_DOMAINS}),
    }


def _check(folder: Path, graph: Any) -> list[str]:
    """Run the ONNX checker over the graph as written; the operators that it could not judge.

    onnxruntime-genai puts operators of ONNX Runtime into the standard domain, where the checker knows none of that
    name. It is shown a copy that has them in the runtime's domain, and checks all the rest.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    private = [node for node in copy.graph.node if node.domain in STANDARD_DOMAINS and not onnx.defs.has(node.op_type)]
    for node in private:
        node.domain = RUNTIME_DOMAIN
    if private and RUNTIME_DOMAIN not in {each.domain for each in copy.opset_import}:
        copy.opset_import.append(onnx.helper.make_opsetid(RUNTIME_DOMAIN, 1))
    path = folder / "check.onnx"  # beside the weights, which the checker looks for
    try:
        with disk_errors(folder):
            onnx.save(copy, path)
        onnx.checker.check_model(str(path), full_check=True)
    finally:
        path.unlink(missing_ok=True)
    return sorted({node.op_type for node in private})


def graph_metadata(folder: Path) -> dict[str, str]:
    """The metadata that an exported graph carries. Raises CheckpointError."""
    found = {entry.key: entry.value for entry in load_graph(folder).metadata_props}
    if not found:
        raise CheckpointError(f"{folder / GRAPH_NAME} carries no metadata")
    return found
