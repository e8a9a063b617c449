"""One tensor of a layer, sliced to what a plan keeps, masked to compute the same at full size, or padded with zeros."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from crepe_deploy.errors import NumericalError

from .layout import Widths
from .plan import Geometry, LayerPlan

_LAYER = re.compile(r"^(?:model\.)?layers\.(\d+)\.(.+)$")
_QUERIES = "self_attn.q_proj"
_KEYS = ("self_attn.k_proj", "self_attn.v_proj")
_OUTPUT = "self_attn.o_proj.weight"
_NEURONS = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = "mlp.down_proj.weight"


def in_layer(name: str) -> tuple[int, str] | None:
    """A checkpoint's tensor name -> (layer, name within the layer); None for what belongs to no layer."""
    found = _LAYER.match(name)
    return (int(found.group(1)), found.group(2)) if found else None


def sliced(path: str, tensor: Tensor, plan: LayerPlan, geometry: Geometry) -> Tensor:
    """What stays of the tensor at `path` of a layer, in its dtype; o_proj and down_proj become the plan's refit ones.

    Norms and the biases of o_proj and down_proj stay whole. Raises NumericalError for a refit that overflows the dtype.
    """
    module = path.rpartition(".")[0]
    if module == _QUERIES:
        return tensor[plan.query_features(geometry)]
    if module in _KEYS:
        return tensor[plan.key_value_features(geometry)]
    if module in _NEURONS:
        return tensor[list(plan.neurons)]
    if path == _OUTPUT:
        return _cast(path, plan.o_proj, tensor.dtype)
    if path == _DOWN:
        return _cast(path, plan.down_proj, tensor.dtype)
    return tensor


def masked(path: str, tensor: Tensor, plan: LayerPlan, geometry: Geometry) -> Tensor:
    """The same at full size: refit columns in their places, zeros elsewhere; all but o_proj and down_proj as it was.

    Heads and neurons whose output columns are zero contribute nothing, whatever their own rows hold.
    """
    if path == _OUTPUT:
        columns, refit = plan.query_features(geometry), plan.o_proj
    elif path == _DOWN:
        columns, refit = torch.tensor(plan.neurons), plan.down_proj
    else:
        return tensor
    whole = torch.zeros_like(tensor)
    whole[:, columns] = _cast(path, refit, tensor.dtype)
    return whole


def _cast(path: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    stored = weight.detach().cpu().to(dtype).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(f"{path}: the refit weight does not fit {str(dtype).removeprefix('torch.')}")
    return stored


def padded(path: str, tensor: Tensor, layer: Widths, target: Widths, head_dim: int) -> Tensor:
    """Attention tensors with heads of zeros added until `target`: groups at the end, query heads behind their group's.

    Added query heads read zeros into o_proj's zero columns, and added KV heads are read by added query heads only, so
    the output is the same.
    """
    if layer == target:
        return tensor
    module = path.rpartition(".")[0]
    if module == _QUERIES:
        return _pad_queries(tensor, layer, target, head_dim)
    if path == _OUTPUT:
        return _pad_queries(tensor.T.contiguous(), layer, target, head_dim).T.contiguous()
    if module in _KEYS:
        grown = tensor.new_zeros((target.kv_heads * head_dim, *tensor.shape[1:]))
        grown[: tensor.shape[0]] = tensor
        return grown
    return tensor


def _pad_queries(tensor: Tensor, layer: Widths, target: Widths, head_dim: int) -> Tensor:
    """tensor (heads * head_dim, ...) -> (target heads * head_dim, ...)."""
    rest = tensor.shape[1:]
    groups, queries = layer.kv_heads, layer.heads // layer.kv_heads
    grown = tensor.new_zeros((target.kv_heads, target.heads // target.kv_heads, head_dim, *rest))
    grown[:groups, :queries] = tensor.view(groups, queries, head_dim, *rest)
    return grown.view(target.heads * head_dim, *rest)


def sized(path: str, shape: tuple[int, ...], layer: Widths, head_dim: int) -> tuple[int, ...]:
    """The shape that the tensor at `path`, of this shape in the source, has in a layer of these widths."""
    module, rest = path.rpartition(".")[0], shape[1:]
    if module == _QUERIES:
        return (layer.heads * head_dim, *rest)
    if module in _KEYS:
        return (layer.kv_heads * head_dim, *rest)
    if module in _NEURONS:
        return (layer.intermediate, *rest)
    if path == _OUTPUT:
        return (shape[0], layer.heads * head_dim)
    if path == _DOWN:
        return (shape[0], layer.intermediate)
    return shape
