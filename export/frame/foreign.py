"""The manifest of a folder that is none of ours: what its files say, and that nobody said the rest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

from torch import Tensor

from ...model.decoder import Decoder, LinearSpec
from ...pattern import NM, Pattern, Unstructured
from ...store.audit import GROUP_SIZES, check_pattern, most_nonzeros
from ...store.manifest import Manifest, TensorRecord, versions
from ...store.sources import Model, describe_source

NOTE: Final = "pruned elsewhere: who did it, by which method and with what calibration is not recorded"


def plain(folder: Path) -> Manifest:
    """What is known of a model folder that nothing was done to."""
    return Manifest(
        stage="source",
        format="dense",
        versions=versions(),
        source=describe_source(Model(folder, "folder", str(folder), None, {})),
        config={"method": None, "resolved_method": {}, "pattern": None},
    )


def counted(folder: Path) -> Manifest:
    """The same, with the pattern of zeros that each linear layer of the blocks holds, by counting.

    Raises CheckpointError, UnsupportedModel.
    """
    decoder, records = Decoder(folder), {}
    for spec in (spec for block in decoder.linears for spec in block):
        weight = decoder.reader.load_finite(spec.key)
        weight = weight.T.contiguous() if spec.transposed else weight
        pattern = sparsest(weight)
        if pattern is not None:
            records[spec.key] = _record(spec, weight, pattern)
    if not records:
        return plain(folder)
    patterns = Counter(record.pattern for record in records.values())
    size = sum(record.shape[0] * record.shape[1] for record in records.values())
    return Manifest(
        stage="import",
        format="dense",
        versions=versions(),
        source=describe_source(Model(folder, "folder", str(folder), None, {"weights": NOTE})),
        config={"method": None, "resolved_method": {}, "pattern": patterns.most_common(1)[0][0]},
        tensors=records,
        dense_tensors=sorted(set(decoder.reader.tensors) - set(records)),
        metrics={
            "sparsity_of_pruned_tensors": sum(record.zeros for record in records.values()) / size,
            "patterns": dict(patterns),
            "pruned_tensors": len(records),
            "mean_layer_error": None,
        },
    )


def sparsest(weight: Tensor) -> Pattern | None:
    """The pattern with the fewest kept weights that weight (out, in) holds, of these the one of the smallest groups.

    N:M in groups of 4 to 32, or a share of every row; None where there is none.
    """
    columns = weight.shape[1]
    held: list[tuple[float, int, Pattern]] = []
    for m in GROUP_SIZES:
        if columns % m == 0 and 0 < (n := most_nonzeros(weight, m)) < m:
            held.append((n / m, m, NM(n, m)))
    zeros = int((weight == 0).sum(-1).amin())
    if 0 < zeros < columns:
        held.append((1 - zeros / columns, columns, Unstructured(zeros / columns, "row")))
    return min(held, key=lambda each: each[:2])[2] if held else None


def _record(spec: LinearSpec, weight: Tensor, pattern: Pattern) -> TensorRecord:
    zeros = check_pattern(spec.key, weight, pattern)
    return TensorRecord(
        shape=(spec.in_features, spec.out_features) if spec.transposed else (spec.out_features, spec.in_features),
        transposed=spec.transposed,
        pattern=str(pattern),
        zeros=zeros,
        sparsity=zeros / weight.numel(),
        layer_error=None,
        layer_error_weighting="unknown",
    )
