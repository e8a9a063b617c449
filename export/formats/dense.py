"""Export `dense`: a Hugging Face folder with explicit zeros, which unmodified transformers and vLLM load.

It is no smaller and no faster than the dense model wherever the reader does not know about the zeros; the model card
says so.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ...errors import VerifyError
from ...model.decoder import Decoder
from ...pattern import parse_record
from ...progress import Meter
from ...store.audit import check_pattern
from ...store.checkpoint import CheckpointReader, TensorInfo
from ...store.files import disk_errors, write_json
from ...store.manifest import LINEAGE, Manifest, TensorRecord
from ...store.pieces import Pieces
from ...store.readback import ReadBack, check_fingerprint
from ...store.values import read_values, scales_name
from ...structural.check import is_structural
from ..frame import usage
from ..frame.card import CARD_NAME
from ..frame.exporter import Exporter, Source, Words, Written
from ..frame.greedy import GREEDY_TOKENS, greedy_of
from ..structural.words import LAYOUT_WORDS
from .unpacking import Unpacking, plan_unpacking, write_unpacked


@dataclass(frozen=True)
class DensePlan:
    """unpacking: of a packed source; None where its files are taken as they are."""

    source: Source
    tensors: list[TensorInfo]
    unpacking: Unpacking | None


@dataclass(frozen=True)
class Dense(Exporter[DensePlan]):
    """The pruned checkpoint as it is, its zeros recounted; a packed source is unpacked, bit by bit what was packed."""

    name: ClassVar[str] = "dense"
    reads: ClassVar[tuple[str, ...]] = ("dense", "packed")
    words: ClassVar[Words] = Words(
        "The zeros are stored explicitly: every Hugging Face reader loads this folder unchanged, and none of them is "
        "smaller or faster for it. Export with `--format packed` for a smaller file.",
        use=usage.PLAIN,
    )

    def plan(self, source: Source, weights: Path) -> DensePlan:
        packed = source.manifest.format == "packed"
        unpacking = plan_unpacking(weights, source.manifest.tensors, scales=True) if packed else None
        return DensePlan(source, list(CheckpointReader(weights)), unpacking)

    def room(self, plan: DensePlan) -> int:
        if plan.unpacking is not None:
            return sum(planned.size_bytes for planned in plan.unpacking.plan.values())
        return 0 if plan.source.fresh else sum(info.size_bytes for info in plan.tensors)

    def steps(self, plan: DensePlan) -> int:
        return len(plan.source.manifest.tensors) + GREEDY_TOKENS

    def write(self, plan: DensePlan, folder: Path, tick: Meter, pieces: Pieces) -> Written:
        if plan.unpacking is not None:
            return Written(fingerprints=write_unpacked(plan.unpacking, folder, pieces))
        for name, sha256 in plan.source.manifest.files.items():
            if name == CARD_NAME or name.startswith(f"{LINEAGE}/") or pieces.file(folder, name) is not None:
                continue
            _place(plan.source.folder / name, folder / name, link=plan.source.fresh)
            if name.endswith(self.suffixes) and not plan.source.fresh:
                pieces.note_file(name, sha256)
        return Written()

    def companions(self, plan: DensePlan, weights: Path, folder: Path) -> None:
        if plan.unpacking is None:
            return  # every file was taken as it is, remote code for widths per layer included
        super().companions(plan, weights, folder)
        write_json(folder / "config.json", plan.unpacking.content)

    def compare(self, plan: DensePlan, written: Written, folder: Path, tick: Meter) -> Written:
        parent, files = plan.source.manifest, ReadBack(folder)
        if plan.unpacking is not None:
            Decoder(folder)  # which names what the architecture needs and the packed folder did not hold
        for name in parent.tensors:
            files.reader.info(name)
        for info, stored in files:
            if plan.unpacking is not None:
                check_fingerprint(folder, info.name, stored, written.fingerprints)
            if info.name in parent.tensors:
                _recount(folder, info.name, stored, parent.tensors[info.name])
                tick()
        if plan.unpacking is not None:
            for name, (_, scales) in read_values(folder).items():
                check_fingerprint(folder, scales_name(name), scales, written.fingerprints)
        else:
            for name, digest in files.hashes.items():
                if digest != parent.files[name]:
                    raise VerifyError(f"{plan.source.folder / name} differs from its sha256 in the manifest")
        return replace(written, hashes=files.hashes, metrics={"greedy": greedy_of(folder, parent, tick)})

    def size(self, plan: DensePlan, folder: Path) -> Mapping[str, Any]:
        parent = plan.source.manifest
        if is_structural(parent):
            size: dict[str, Any] = parent.metrics["size"]  # as small as before: nothing was removed or added here
            return size
        return {"weight_bytes_over_dense": 1.0, "what": "zeros are stored; no smaller, no faster by itself"}

    def words_of(self, manifest: Manifest) -> Words:
        return LAYOUT_WORDS.get(manifest.config.get("structural", {}).get("layout"), self.words)


def _place(source: Path, target: Path, *, link: bool) -> None:
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if link:
            try:
                os.link(source, target)
                return
            except OSError:
                pass  # another file system, or one without hard links: copy
        shutil.copyfile(source, target)


def _recount(folder: Path, name: str, stored: Tensor, record: TensorRecord) -> None:
    weight = stored.mT.contiguous() if record.transposed else stored
    zeros = record.recounted(name, check_pattern(name, weight, parse_record(record.pattern)), stored.shape).zeros
    if zeros != record.zeros:
        raise VerifyError(f"{folder / name}: {zeros} zeros were counted and the manifest says {record.zeros}")
