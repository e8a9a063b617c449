"""From a transformers decoder to one ONNX graph whose key-value cache is flat inputs and outputs.

The large weights are allocated and never touched while the graph is made (tracing only asks for shapes), so this
costs no memory for them; `weights` puts the real ones in.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...errors import UnsupportedModel

OPSET: Final = 20
_BATCH, _SEQUENCE, _PAST = 2, 3, 5  # of the example: different, and none of them 0 or 1, which would be specialised


class FlatCache(nn.Module):
    """The model with past keys and values as plain tensors: what a graph's inputs and outputs must be."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        """Logits (batch, sequence, vocab), then each layer's keys and values (batch, heads, past + sequence, width)."""
        from transformers import DynamicCache

        cache = DynamicCache()  # without a config: sliding layers keep everything, and the mask hides what is too far
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        flat = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (output.logits, *flat)


def trace(model: nn.Module, dtype: torch.dtype) -> Any:
    """The onnx_ir model of a causal language model on the CPU, unoptimised, its inputs and outputs named.

    dtype: of the cache. Of matrices only the shapes are read. Raises UnsupportedModel
    naming the operator or the structure that cannot be exported.
    """
    caches = cache_shapes(model)
    past = [tuple(torch.zeros(_BATCH, heads, _PAST, width, dtype=dtype) for _ in "kv") for heads, width in caches]
    total = _PAST + _SEQUENCE
    example = (
        torch.ones(_BATCH, _SEQUENCE, dtype=torch.long),
        torch.ones(_BATCH, total, dtype=torch.long),
        torch.arange(_PAST, total).repeat(_BATCH, 1),
        past,
    )
    free = torch.export.Dim.DYNAMIC
    pairs = [tuple({0: free, 2: free} for _ in "kv") for _ in caches]
    rows = {0: free, 1: free}
    shapes = {"input_ids": rows, "attention_mask": rows, "position_ids": rows, "past": pairs}
    inputs, outputs = value_names(len(caches))
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                FlatCache(model).eval(), example, dynamo=True, dynamic_shapes=shapes, input_names=inputs,
                output_names=outputs, opset_version=OPSET, optimize=False, verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise UnsupportedModel(f"{type(model).__name__} cannot be exported to ONNX: {_cause(error)}") from error
    assert program is not None
    return program.model


def cache_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """Key-value heads and head width of every layer, from the projections themselves: layers may differ."""
    found = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            width = int(module.head_dim)
            found.append((int(module.k_proj.weight.shape[0]) // width, width))
    return found


def value_names(layers: int) -> tuple[list[str], list[str]]:
    """The names of the graph's inputs and outputs, as users of ONNX decoders know them."""
    pairs = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{pair}" for pair in pairs)]
    return inputs, ["logits", *(f"present.{pair}" for pair in pairs)]


def name_dimensions(model: Any) -> None:
    """Free dimensions by name at the border; inside, torch's symbols are dropped for shape inference to find anew."""
    import onnx_ir as ir

    graph = model.graph
    ends = {id(value) for value in graph.outputs}
    for node in graph:
        for output in node.outputs:
            if id(output) not in ends:
                output.shape = None
    batch, length, past = "batch_size", "sequence_length", "past_sequence_length"
    total = f"{past} + {length}"
    named: dict[str, list[str | None]] = {"attention_mask": [batch, total], "logits": [batch, length, None]}
    caches: dict[str, list[str | None]] = {
        "past_key_values": [batch, None, past, None],
        "present": [batch, None, total, None],
    }
    for value in [*graph.inputs, *graph.outputs]:
        names = named.get(value.name) or caches.get(value.name.split(".")[0], [batch, length])
        value.shape = ir.Shape([value.shape[axis] if name is None else name for axis, name in enumerate(names)])


def _cause(error: BaseException) -> str:
    """The innermost error's first line: it names the operator or the line of the model."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes about libraries that are not installed and its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
