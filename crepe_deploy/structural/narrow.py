"""A transformers block made as narrow as a plan says, in memory and for a while."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from crepe_deploy.errors import UnsupportedModel
from crepe_deploy.model.decoder import Decoder, LinearSpec

from .layout import structure_of
from .plan import Geometry, LayerPlan
from .slicing import sliced


def require_family(decoder: Decoder) -> None:
    """Refuse a decoder of another family, or whose blocks are not laid out like its family's.

    Raises UnsupportedModel naming what differs.
    """
    kind = decoder.config.model_type
    paths = set(structure_of(kind).projections.paths)
    for index, specs in enumerate(decoder.linears):
        if differing := paths ^ {spec.path for spec in specs}:
            raise UnsupportedModel(
                f"block {index} of '{kind}' differs from what the family has in: {', '.join(sorted(differing))}"
            )


def output_specs(decoder: Decoder, index: int) -> list[LinearSpec]:
    """`o_proj` and `down_proj` of one block, in this order."""
    projections = structure_of(decoder.config.model_type).projections
    by_path = {spec.path: spec for spec in decoder.linears[index]}
    return [by_path[projections.output], by_path[projections.down]]


@contextlib.contextmanager
def narrowed(block: nn.Module, plan: LayerPlan, geometry: Geometry) -> Iterator[nn.Module]:
    """Inside, `block` is the smaller layer of `plan`; afterwards it is what it was."""
    attention = block.get_submodule(geometry.structure.projections.output.rpartition(".")[0])
    parameters = dict(block.named_parameters())
    narrow = _attention_state(attention, plan, geometry)
    whole = {name: getattr(attention, name) for name in narrow}
    try:
        for name, parameter in parameters.items():
            smaller = sliced(name, parameter.data, plan, geometry)
            _put(block, name, nn.Parameter(smaller, requires_grad=False))
        _set(attention, narrow)
        yield block
    finally:
        _set(attention, whole)
        for name, parameter in parameters.items():
            _put(block, name, parameter)


def _attention_state(attention: nn.Module, plan: LayerPlan, geometry: Geometry) -> dict[str, Any]:
    """The attributes of the attention module that its forward pass reads widths from, as the plan has them."""
    state: dict[str, Any] = {"num_key_value_groups": len(plan.queries[0]), "num_key_value_heads": plan.kv_heads}
    if "config" in geometry.structure.attention_reads:
        state["config"] = copy.copy(attention.config)
        state["config"].num_attention_heads = plan.heads
    return {name: state[name] for name in geometry.structure.attention_reads}


def _set(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(module, name, value)


def _put(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    block.get_submodule(path)._parameters[leaf] = parameter
