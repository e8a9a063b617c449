"""Blocks that a stopped run has pruned: noted in its journal, and sent through again without being pruned again.

The hidden states in front of a block are not kept, for they would take more room than the weights: a resumed run sends
them once more through the dense and the pruned blocks, as the run before did behind its pruning.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crepe_deploy.model.decoder import follow
from crepe_deploy.store.journal import Journal, numbers
from crepe_deploy.store.values import scales_name
from crepe_deploy.store.writing import CheckpointWriter

from .block import BlockResult, Streams, send_dense, send_pruned
from .layer import LayerResult
from .run_plan import RunPlan
from .steps.repair import Repaired, is_repaired


def note(journal: Journal, index: int, result: BlockResult, fingerprints: Mapping[str, str]) -> None:
    """Note that block `index` is pruned and written. fingerprints: sha256 by name of its tensors.

    Raises DiskFullError.
    """
    entry = {
        "layers": {name: asdict(layer) for name, layer in result.layers.items()},
        "repaired": None if result.repaired is None else asdict(result.repaired),
        "seconds": dict(result.seconds),
        "sha256": dict(fingerprints),
    }
    journal.add("block", str(index), entry)


def replayed(
    plan: RunPlan, index: int, streams: Streams, weights: dict[str, Tensor], journal: Journal, writer: CheckpointWriter
) -> BlockResult | None:
    """What an earlier run did to block `index`, its tensors `weights` filled with it and the streams sent through.

    None where it did not get so far, or its files do not hold what it noted: then nothing is changed.
    Raises ConfigError where the journal is damaged.
    """
    names = {spec.key for spec in plan.targets[index]}
    tensors = weights.keys() | (set() if plan.config.steps.values is None else set(map(scales_name, names)))
    entry = journal.get("block", str(index), partial(is_block, names=names, tensors=tensors))
    if entry is None or not writer.keep(entry["sha256"]):
        return None
    send_dense(plan, index, streams)
    _fill(plan, index, weights, writer)
    send_pruned(plan, index, streams)
    layers = {name: LayerResult(**layer) for name, layer in entry["layers"].items()}
    repaired = None if entry["repaired"] is None else Repaired(**entry["repaired"])
    return BlockResult(layers, repaired, entry["seconds"])


@torch.inference_mode()
def _fill(plan: RunPlan, index: int, weights: dict[str, Tensor], writer: CheckpointWriter) -> None:
    block, prefix = plan.decoder.blocks[index], f"{plan.decoder.blocks_path}.{index}."
    for name, parameter in block.named_parameters():
        for piece in plan.decoder.pieces(prefix + name, tuple(parameter.shape)):
            weights[piece.key].copy_(writer.read(piece.key))
            follow(piece.of(parameter.data), weights[piece.key])


def are_patterns(value: Any, names: Set[str]) -> bool:
    """Whether what a journal holds are patterns as text for all of these tensors."""
    return isinstance(value, dict) and value.keys() == names and all(isinstance(text, str) for text in value.values())


def is_block(value: Any, names: Set[str], tensors: Set[str]) -> bool:
    """Whether what a journal holds is the record of a block with these targets and tensors."""
    if not isinstance(value, dict) or value.keys() != {"layers", "repaired", "seconds", "sha256"}:
        return False
    layers, repaired, sha256 = value["layers"], value["repaired"], value["sha256"]
    return (
        isinstance(layers, dict)
        and layers.keys() == names
        and all(_is_layer(layer) for layer in layers.values())
        and (repaired is None or is_repaired(repaired))
        and _are_numbers(value["seconds"])
        and isinstance(sha256, dict)
        and sha256.keys() == tensors
        and all(isinstance(text, str) for text in sha256.values())
    )


def _is_layer(layer: Any) -> bool:
    return (
        isinstance(layer, dict)
        and layer.keys() == {"error", "weighting", "zeros", "notes"}
        and layer["weighting"] in ("none", "input-norm")
        and numbers([layer["error"], layer["zeros"]])
        and _are_numbers(layer["notes"])
    )


def _are_numbers(table: Any) -> bool:
    return isinstance(table, dict) and numbers(list(table.values()))
