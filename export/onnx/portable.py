"""The portable flavour: one graph for any ONNX runtime, its weights streamed from the checkpoint into one file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...model.decoder import Decoder
from ...store.files import disk_errors
from .inspect import GRAPH_NAME
from .trace import name_dimensions, trace
from .weights import allocate, attach

DATA_NAME: Final = f"{GRAPH_NAME}.data"
DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16}
_INLINE_BYTES: Final = 1024  # constants of at most this size stay in the graph, where shape inference reads them


def build_portable(source: Path, folder: Path, precision: str) -> None:
    """Write the graph of the dense checkpoint `source` into `folder`. Raises UnsupportedModel, CheckpointError."""
    dtype = DTYPES[precision]
    decoder = Decoder(source, str(dtype).removeprefix("torch."))
    model = decoder.model
    model.set_submodule(decoder.blocks_path, nn.ModuleList(decoder.blocks))  # the blocks themselves, not their slots

    def load(name: str) -> Tensor:
        return decoder.reader.load_finite(decoder.key(name)).to(dtype)

    write_graph(model, load, folder, dtype)


def write_graph(model: nn.Module, load: Callable[[str], Tensor], folder: Path, dtype: torch.dtype) -> None:
    """Write the graph of `model`, its parameters on the meta device, whose weights `load(name)` gives one at a time.

    A model whose layers differ in width is traced as it is. Raises UnsupportedModel, CheckpointError.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    allocate(model, load)
    graph: Any = trace(model, dtype)
    attach(graph, load, model)
    name_dimensions(graph)
    ClearMetadataAndDocStringPass()(graph)
    with disk_errors(folder):
        ir.save(graph, folder / GRAPH_NAME, external_data=DATA_NAME, size_threshold_bytes=_INLINE_BYTES, max_workers=1)
