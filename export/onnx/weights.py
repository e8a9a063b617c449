"""The weights of a traced graph: named as in the checkpoint, stored as MatMul reads them, read when they are written.

A tracer leaves `MatMul(x, Transpose(W))`. ONNX Runtime would transpose at every start, so W is stored (in, out) where
nothing else reads it; where an embedding does (tied models) the Transpose stays and W is stored once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import CheckpointError
from .simplify import simplify

Load = Callable[[str], Tensor]
WRAPPER: Final = "model."
LARGE_ELEMENTS: Final = 1 << 20  # a computed constant of this size would be a weight


def allocate(model: nn.Module, load: Load) -> None:
    """Give a model on the meta device its vectors by name through `load`; matrices are left untouched."""
    tied = tied_names(model)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in tied:
            # torch.empty maps pages and touches none: a large matrix takes no memory
            matrix = parameter.ndim > 1
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype) if matrix else load(name)
            _set(model, name, nn.Parameter(tensor.to(parameter.dtype), requires_grad=False))
    for name, source in tied.items():
        _set(model, name, model.get_parameter(source))


def tied_names(model: nn.Module) -> dict[str, str]:
    """By name of each parameter that is another one: that one's name."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = parameter


@dataclass
class _Matrix:
    """A matrix of the graph: the checkpoint's name for it, and whether the graph stores it transposed."""

    name: str
    transposed: bool = False


def attach(graph_model: Any, load: Load, model: nn.Module) -> None:
    """Optimise the traced graph of `model`, and make each matrix lazy: `load(name)` reads it when the graph is saved.

    Raises CheckpointError for a large constant that is no parameter: it would be computed from memory never filled.
    """
    import onnx_ir as ir

    matrices = _matrices(graph_model, model)
    _store_as_read(graph_model, matrices)
    simplify(graph_model, lambda node: False if _reads(node, matrices) else None)
    for value in list(graph_model.graph.initializers.values()):
        tensor = value.const_value
        if id(value) in matrices:
            matrix = matrices[id(value)]
            value.name = matrix.name
            read = _reader(load, matrix, tensor.dtype)
            value.const_value = ir.LazyTensor(read, tensor.dtype, tensor.shape, cache=False, name=matrix.name)
        elif tensor is not None and tensor.size >= LARGE_ELEMENTS:
            raise CheckpointError(f"the graph computes '{value.name}' {tuple(tensor.shape)} from weights not yet read")


def _matrices(graph_model: Any, model: nn.Module) -> dict[int, _Matrix]:
    """By id of the graph's value."""
    names = {name for name, each in model.named_parameters(remove_duplicate=False) if each.ndim > 1}
    tied = tied_names(model)
    plain = {id(value): name.removeprefix(WRAPPER) for name, value in graph_model.graph.initializers.items()}
    return {key: _Matrix(tied.get(name, name)) for key, name in plain.items() if name in names}


def _store_as_read(graph_model: Any, matrices: dict[int, _Matrix]) -> None:
    """Drop each Transpose that is a matrix's only reader, and give every matrix a stand-in that takes no memory."""
    import onnx_ir as ir

    for index, value in enumerate(list(graph_model.graph.initializers.values())):
        if id(value) not in matrices:
            continue
        shape = tuple(value.const_value.shape)
        users = [use.node for use in value.uses()]
        if len(users) == 1 and users[0].op_type == "Transpose" and list(users[0].attributes["perm"].value) == [1, 0]:
            users[0].outputs[0].replace_all_uses_with(value)
            graph_model.graph.remove(users[0], safe=True)
            matrices[id(value)].transposed = True
            shape = shape[::-1]
        # Each stand-in is another number, so that no two matrices of one shape are merged for being equal.
        stand_in = np.broadcast_to(np.asarray(index, value.dtype.numpy()), shape)
        value.const_value = ir.Tensor(stand_in, dtype=value.dtype, name=value.name)
        value.shape = ir.Shape(shape)


def _reads(node: Any, matrices: Mapping[int, object]) -> bool:
    return any(value is not None and id(value) in matrices for value in node.inputs)


def _reader(load: Load, matrix: _Matrix, dtype: Any) -> Callable[[], Any]:
    import onnx_ir as ir

    def read() -> Any:
        weight = load(matrix.name)
        stored = weight.T.contiguous() if matrix.transposed else weight.contiguous()
        return ir.Tensor(stored.numpy(), dtype=dtype, name=matrix.name)

    return read
