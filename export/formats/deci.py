"""Export `deci`: widths per layer in the DeciLM layout, which stock vLLM serves without crepe-deploy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ...errors import ConfigError
from ...model.decoder import PROOF_DTYPE, Decoder
from ...model.proof import check_parity, walk_logits
from ...progress import Meter
from ...pruning.config import PruneConfig
from ...store.checkpoint import read_config
from ...store.files import write_json
from ...store.pieces import Pieces
from ...store.writing import Planned
from ...structural import layout as layouts
from ...structural.slicing import padded
from ..frame.exporter import Exporter, Source, Words, Written
from ..structural.assemble import (
    Layout,
    deci_layout,
    layer_record,
    plan_sliced,
    probe_tokens,
    relative_size,
    seal,
    write_sliced,
)
from ..structural.words import LAYOUT_WORDS


@dataclass(frozen=True)
class DeciPlan:
    """layout: the widths as they are and as they will be. tensors: what will be written."""

    source: Source
    decoder: Decoder
    layout: Layout
    head_dim: int
    tensors: dict[str, Planned]


@dataclass(frozen=True)
class Deci(Exporter[DeciPlan]):
    """A dense folder with widths per layer, padded to what the DeciLM layout holds."""

    name: ClassVar[str] = "deci"
    words: ClassVar[Words] = LAYOUT_WORDS["deci"]

    def check_pruning(self, model: Path, config: PruneConfig) -> None:
        raise ConfigError("--format deci is for folders with widths per layer: crepe-deploy export DIR --format deci")

    def plan(self, source: Source, weights: Path) -> DeciPlan:
        content = read_config(weights)
        if content.get("model_type") not in layouts.PER_LAYER_CLASSES:
            raise ConfigError(f"{weights} has no widths per layer; --format deci reads a dense folder that has")
        if source.manifest.tensors:
            raise ConfigError(f"{weights} holds zeros in a pattern, which the DeciLM layout's added heads would hide")
        family = {**content, "model_type": content["model_type"].removeprefix(layouts.PREFIX)}
        for name in ("per_layer_config", "auto_map"):
            family.pop(name, None)
        head_dim = int(content["head_dim"])
        layout = deci_layout(family, head_dim, content["num_key_value_heads"], layouts.layer_widths(content))
        decoder = Decoder(weights, PROOF_DTYPE)
        return DeciPlan(source, decoder, layout, head_dim, plan_sliced(decoder.reader, layout, head_dim))

    def room(self, plan: DeciPlan) -> int:
        return sum(planned.size_bytes for planned in plan.tensors.values())

    def steps(self, plan: DeciPlan) -> int:
        return len(plan.layout.kept)

    def write(self, plan: DeciPlan, folder: Path, tick: Meter, pieces: Pieces) -> Written:
        kept, written = plan.layout.kept, plan.layout.written

        def transform(index: int, path: str, tensor: Tensor) -> Tensor:
            return padded(path, tensor, kept[index], written[index], plan.head_dim)

        write_sliced(plan.decoder.reader, folder, plan.tensors, plan.layout, transform, tick, pieces)
        return Written()

    def companions(self, plan: DeciPlan, weights: Path, folder: Path) -> None:
        super().companions(plan, weights, folder)
        write_json(folder / "config.json", plan.layout.proof)

    def compare(self, plan: DeciPlan, written: Written, folder: Path, tick: Meter) -> Written:
        """With the configuration of our own classes, which compute the same; then the DeciLM one takes its place."""
        tokens = probe_tokens(plan.decoder)
        parity = check_parity(folder, PROOF_DTYPE, tokens, walk_logits(plan.decoder, tokens))
        seal(folder, plan.layout)
        before = plan.source.manifest.config.get("structural", {})
        return replace(
            written,
            metrics={"parity": parity},
            config={"structural": {**before, **layer_record(plan.layout)}},
        )

    def size(self, plan: DeciPlan, folder: Path) -> Mapping[str, Any]:
        return relative_size(folder, plan.decoder.reader, plan.source.manifest.metrics.get("size", {}))
