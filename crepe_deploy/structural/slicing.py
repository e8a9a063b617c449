"""One tensor of a layer, sliced to what a plan keeps, masked to compute the same at full size, or padded with zeros."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from crepe_deploy.errors import NumericalError
from crepe_deploy.model.structure import SEPARATE, Part, Projections

from .layout import Widths, part_rows
from .plan import Geometry, LayerPlan

_LAYER = re.compile(r"^(?:model\.)?layers\.(\d+)\.(.+)$")


def in_layer(name: str) -> tuple[int, str] | None:
    """A checkpoint's tensor name -> (layer, name within the layer); None for what belongs to no layer."""
    match = _LAYER.match(name)
    return (int(match.group(1)), match.group(2)) if match else None


def sliced(path: str, tensor: Tensor, plan: LayerPlan, geometry: Geometry) -> Tensor:
    """What stays of the tensor at `path` of a layer, where it is, in its dtype; o_proj and down_proj become the plan's.

    Norms and the biases of o_proj and down_proj stay whole; what was tuned goes before all. Raises NumericalError for a
    refit that overflows the dtype.
    """
    if path in plan.tuned:
        return _cast(path, plan.tuned[path], tensor)
    projections = geometry.structure.projections
    if parts := projections.rows.get(path.rpartition(".")[0]):
        return tensor[_kept_rows(parts, plan, geometry).to(tensor.device)]
    if path == f"{projections.output}.weight":
        return _cast(path, plan.o_proj, tensor)
    if path == f"{projections.down}.weight":
        return _cast(path, plan.down_proj, tensor)
    return tensor


def _kept_rows(parts: tuple[Part, ...], plan: LayerPlan, geometry: Geometry) -> Tensor:
    """The rows that stay of a matrix made of `parts`, int64, in kept order."""
    rows = part_rows(Widths(geometry.heads, geometry.kv_heads, geometry.intermediate), geometry.head_dim)
    kept, start = [], 0
    for part in parts:
        kept.append(start + _part_features(part, plan, geometry))
        start += rows[part]
    return torch.cat(kept)


def _part_features(part: Part, plan: LayerPlan, geometry: Geometry) -> Tensor:
    if part == "q":
        return plan.query_features(geometry)
    if part in ("k", "v"):
        return plan.key_value_features(geometry)
    return torch.tensor(plan.neurons)


def masked(path: str, tensor: Tensor, plan: LayerPlan, geometry: Geometry) -> Tensor:
    """The same at full size: refit columns in their places, zeros elsewhere, tuned rows in theirs; the rest as it was.

    Heads and neurons whose output columns are zero contribute nothing, whatever their own rows hold.
    """
    projections = geometry.structure.projections
    if path == f"{projections.output}.weight":
        columns = plan.query_features(geometry)
    elif path == f"{projections.down}.weight":
        columns = torch.tensor(plan.neurons)
    elif path in plan.tuned:
        parts, small = projections.rows.get(path.rpartition(".")[0]), sliced(path, tensor, plan, geometry)
        if parts is None:
            return small
        return tensor.index_copy(0, _kept_rows(parts, plan, geometry).to(tensor.device), small)
    else:
        return tensor
    return torch.zeros_like(tensor).index_copy_(1, columns.to(tensor.device), sliced(path, tensor, plan, geometry))


def _cast(path: str, weight: Tensor, like: Tensor) -> Tensor:
    """`weight` where `like` is, in its dtype."""
    stored = weight.detach().to(like.device, like.dtype).contiguous()
    if not bool(torch.isfinite(stored).all()):
        raise NumericalError(f"{path}: the refit weight does not fit {str(like.dtype).removeprefix('torch.')}")
    return stored


def padded(path: str, tensor: Tensor, layer: Widths, target: Widths, head_dim: int) -> Tensor:
    """Attention tensors with heads of zeros added until `target`: groups at the end, query heads behind their group's.

    Added query heads read zeros into o_proj's zero columns, and added KV heads are read by added query heads only, so
    the output is the same. Only for matrices that are stored apart, as all are that the DeciLM layout can hold.
    """
    if layer == target:
        return tensor
    parts = SEPARATE.rows.get(path.rpartition(".")[0])
    if parts == ("q",):
        return _pad_queries(tensor, layer, target, head_dim)
    if path == f"{SEPARATE.output}.weight":
        return _pad_queries(tensor.T.contiguous(), layer, target, head_dim).T.contiguous()
    if parts in (("k",), ("v",)):
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


def sized(
    path: str, shape: tuple[int, ...], layer: Widths, head_dim: int, projections: Projections
) -> tuple[int, ...]:  # fmt: skip
    """The shape that the tensor at `path`, of this shape in the source, has in a layer of these widths."""
    rows = part_rows(layer, head_dim)
    if parts := projections.rows.get(path.rpartition(".")[0]):
        return (sum(rows[part] for part in parts), *shape[1:])
    if path == f"{projections.output}.weight":
        return (shape[0], rows["q"])
    if path == f"{projections.down}.weight":
        return (shape[0], rows["up"])
    return shape
