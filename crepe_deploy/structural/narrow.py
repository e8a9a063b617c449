"""A transformers block made as narrow as a plan says, in memory and for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from crepe_deploy.errors import UnsupportedModel
from crepe_deploy.model.decoder import Decoder, LinearSpec

from .layout import FAMILIES
from .plan import Geometry, LayerPlan
from .slicing import sliced

ATTENTION = "self_attn.o_proj"
FFN = "mlp.down_proj"
_INNER = {f"self_attn.{name}_proj" for name in "qkv"} | {"mlp.gate_proj", "mlp.up_proj"}


def require_family(decoder: Decoder) -> None:
    """Refuse a decoder whose blocks are not laid out like Llama's. Raises UnsupportedModel naming what differs."""
    kind = decoder.config.model_type
    if kind not in FAMILIES:
        raise UnsupportedModel(f"structural pruning of model type '{kind}' is unknown; known: {', '.join(FAMILIES)}")
    wanted = {*_INNER, ATTENTION, FFN}
    for index, specs in enumerate(decoder.linears):
        if found := wanted ^ {spec.path for spec in specs}:
            raise UnsupportedModel(f"block {index} of '{kind}' differs from Llama's in: {', '.join(sorted(found))}")


def output_specs(decoder: Decoder, index: int) -> list[LinearSpec]:
    """`o_proj` and `down_proj` of one block, in this order."""
    by_path = {spec.path: spec for spec in decoder.linears[index]}
    return [by_path[ATTENTION], by_path[FFN]]


@contextlib.contextmanager
def narrowed(block: nn.Module, plan: LayerPlan, geometry: Geometry) -> Iterator[nn.Module]:
    """Inside, `block` is the smaller layer of `plan`; afterwards it is what it was."""
    attention: Any = block.get_submodule("self_attn")
    shared = attention.num_key_value_groups
    before = dict(block.named_parameters())
    try:
        for name, parameter in before.items():
            smaller = sliced(name, parameter.data, plan, geometry)
            _put(block, name, nn.Parameter(smaller, requires_grad=False))
        attention.num_key_value_groups = len(plan.queries[0])
        yield block
    finally:
        attention.num_key_value_groups = shared
        for name, parameter in before.items():
            _put(block, name, parameter)


def _put(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    block.get_submodule(path)._parameters[leaf] = parameter
