"""What the manifest says of pruned tensors, those that hold the matrices of many experts among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crepe_deploy.model.decoder import LinearSpec
from crepe_deploy.model.inside import FEWEST_TOKENS
from crepe_deploy.store.manifest import TensorRecord

from .layer import LayerResult
from .run_plan import RunPlan

ROUTED = "routed_tokens"  # the note of a matrix of an expert: how many tokens of the text were routed there


def by_tensor(plan: RunPlan) -> dict[str, list[LinearSpec]]:
    """The targets by stored tensor, in the order of the blocks."""
    found: dict[str, list[LinearSpec]] = {}
    for spec in (spec for block in plan.targets for spec in block):
        found.setdefault(spec.tensor, []).append(spec)
    return found


def records_of(
    plan: RunPlan, layers: Mapping[str, LayerResult], zeros: Mapping[str, int]
) -> dict[str, TensorRecord]:  # fmt: skip
    """What the manifest says of each pruned tensor. Of one with many experts errors and notes are their means."""
    records = {}
    for name, specs in by_tensor(plan).items():
        first, results = specs[0], [layers[spec.key] for spec in specs]
        shape, count = (first.out_features, first.in_features), sum(zeros[spec.key] for spec in specs)
        stored = shape[::-1] if first.transposed else shape
        records[name] = TensorRecord(
            shape=(len(specs), *stored) if first.within else stored,
            transposed=first.transposed,
            pattern=str(plan.patterns[first.key]),
            zeros=count,
            sparsity=count / (len(specs) * shape[0] * shape[1]),
            layer_error=sum(result.error for result in results) / len(results),
            layer_error_weighting=results[0].weighting,
            notes={
                note: sum(result.notes.get(note, 0.0) for result in results) / len(results) for note in results[0].notes
            },
        )
    return records


def of_experts(plan: RunPlan, layers: Mapping[str, LayerResult]) -> tuple[dict[str, Any], list[str]]:
    """For the metrics: which experts were measured on all tokens of their layer, by its number; and the same in words.

    Nothing where no text was read or no expert is pruned.
    """
    seen: dict[int, dict[int, float]] = {}
    for index, block in enumerate(plan.targets):
        for spec in block:
            if spec.expert is not None and ROUTED in layers[spec.key].notes:
                seen.setdefault(index, {})[spec.expert] = layers[spec.key].notes[ROUTED]
    if not seen:
        return {}, []
    few = {index: [one for one, tokens in block.items() if tokens < FEWEST_TOKENS] for index, block in seen.items()}
    record = {
        "pruned": sum(map(len, seen.values())),
        "fewest_tokens": FEWEST_TOKENS,
        "measured_on_all_tokens_of_the_layer": {str(index): experts for index, experts in few.items() if experts},
    }
    count = sum(map(len, few.values()))
    said = (
        f"{count} of {record['pruned']} experts were routed fewer than {FEWEST_TOKENS} tokens of the calibration text: "
        "they are pruned by all tokens of their layer (manifest.json names them); more text, or text of what the model "
        "is for, reaches more of them"
    )
    return {"experts": record}, [said] if count else []
