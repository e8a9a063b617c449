"""Export `onnx`: a graph that runs, says what its checkpoint says, and claims no speed that zeros do not give."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final

from ...model.architecture import load_config
from ...progress import Meter
from ...pruning.config import PruneConfig
from ...store.checkpoint import CheckpointReader
from ...store.companions import companions_of
from ...store.files import clear
from ...store.manifest import sha256_file
from ...store.pieces import Pieces
from ..frame import usage
from ..frame.exporter import Exporter, Source, Words, Written
from ..frame.greedy import greedy_of
from ..onnx.checks import finish_graph
from ..onnx.genai import build_genai
from ..onnx.inspect import GRAPH_NAME
from ..onnx.parity import own_greedy, prove
from ..onnx.portable import DATA_NAME, build_portable
from ..onnx.recount import recount
from ..onnx.support import check_end, check_model, check_options
from .unpacking import as_dense

DTYPES: Final = {"fp32": "float32", "fp16": "float16", "int4": "int4"}
_BYTES: Final = {"fp32": 4.0, "fp16": 2.0, "int4": 1.5}  # of each weight on the disk, at most; int4 keeps tables fp32
_STAGES: Final = 5
PADDING: Final = {
    "portable": "prompts of different lengths may share a batch, padded on the left",
    "genai": "the prompts of a batch must have one length: its attention gives left-padded rows wrong answers",
}


@dataclass(frozen=True)
class OnnxPlan:
    """dense: the folder that the graph is built from, a packed source's copy among them."""

    source: Source
    dense: Path


@dataclass(frozen=True)
class Onnx(Exporter[OnnxPlan]):
    """A graph, proven against its checkpoint; a packed source is unpacked beside it first, and the manifest says so.

    flavor: "portable", one graph for any runtime, or "genai", onnxruntime-genai's own. precision: of its weights.
    """

    flavor: str = "portable"
    precision: str = "fp32"

    name: ClassVar[str] = "onnx"
    reads: ClassVar[tuple[str, ...]] = ("dense", "packed")
    suffixes: ClassVar[tuple[str, ...]] = (".onnx", ".data")
    words: ClassVar[Words] = Words(
        "An ONNX graph that was compared with its checkpoint, prefill and decoding. ONNX Runtime multiplies by stored "
        "zeros like by any other value, on CPU and CUDA: pruning made this folder neither smaller nor faster there. "
        "`manifest.json` says what the graph takes as padding, and for 2:4 which settings of TensorRT use the pattern.",
        use=usage.ONNX,
        library="onnx",
    )

    def check(self) -> None:
        check_options(self.flavor, self.precision)

    def check_pruning(self, model: Path, config: PruneConfig) -> None:
        check_model(load_config(model), self.flavor)

    def weights(self, source: Source, folder: Path) -> contextlib.AbstractContextManager[Path]:
        return as_dense(source, folder)

    def plan(self, source: Source, weights: Path) -> OnnxPlan:
        config = load_config(weights)
        check_model(config, self.flavor)
        check_end(weights, config, self.flavor)
        return OnnxPlan(source, weights)

    def room(self, plan: OnnxPlan) -> int:
        elements = sum(info.size_bytes // info.dtype.itemsize for info in CheckpointReader(plan.dense))
        return int(elements * _BYTES[self.precision])

    def steps(self, plan: OnnxPlan) -> int:
        return _STAGES

    def write(self, plan: OnnxPlan, folder: Path, tick: Meter, pieces: Pieces) -> Written:
        names = pieces.names  # the graph is noted last
        whole = GRAPH_NAME in names and all(pieces.file(folder, name) is not None for name in names)
        if not whole:
            clear(folder)
            build = build_portable if self.flavor == "portable" else build_genai
            build(plan.dense, folder, self.precision)
        (tick.before if whole else tick)()
        graph = finish_graph(folder, self._metadata(plan.source))  # a finished one stays as it is
        hashes = {name: sha256_file(folder / name) for name in _built(plan, folder)}
        for name in hashes if not whole else ():
            pieces.note_file(name, hashes[name])
        tick()
        return Written(hashes=hashes, metrics={"graph": graph})

    def compare(self, plan: OnnxPlan, written: Written, folder: Path, tick: Meter) -> Written:
        parent = plan.source.manifest
        sparsity = recount(folder, parent, self.flavor, self.precision)
        tick()
        parity = prove(folder, plan.dense, self.precision, self.flavor)
        tick()
        greedy = self._greedy(plan, folder)
        tick()
        record = {
            "flavor": self.flavor,
            "precision": self.precision,
            "padding": PADDING[self.flavor],
            "source": "packed, unpacked tensor by tensor for this export"
            if parent.format == "packed"
            else parent.format,
            "graph": written.metrics["graph"],
            "sparsity": sparsity,
            "parity": parity,
        }
        return replace(written, metrics={"onnx": record, "greedy": greedy})

    def size(self, plan: OnnxPlan, folder: Path) -> Mapping[str, Any]:
        before = sum(path.stat().st_size for path in CheckpointReader(plan.dense).files)
        after = sum((folder / name).stat().st_size for name in (GRAPH_NAME, DATA_NAME))
        return {
            "graph_bytes": after,
            "file_bytes_over_dense": after / before,
            "weight_bytes_over_dense": after / before,
            "what": "bytes of the graph and its weights over the dense checkpoint's files; zeros are stored",
        }

    def _metadata(self, source: Source) -> dict[str, str]:
        """What the graph file itself says of its origin; the hash is that of the checkpoint's manifest."""
        manifest = source.manifest
        revision = f" @ {manifest.source.revision}" if manifest.source.revision else ""
        return {
            "base_model": manifest.source.id + revision,
            "method": str(manifest.config["method"] or "unknown"),
            "pattern": str(manifest.config["pattern"]),
            "sparsity": f"{manifest.metrics.get('sparsity_of_pruned_tensors', 0.0):.6f}",
            "source_manifest_sha256": str(source.parent),
            "flavor": self.flavor,
            "precision": self.precision,
            "made_with": f"crepe-deploy {manifest.versions['crepe-deploy']}",
        }

    def _greedy(self, plan: OnnxPlan, folder: Path) -> dict[str, Any]:
        """What a server of this folder must answer: the checkpoint's own words, or, of rounded weights, the graph's."""
        greedy = greedy_of(plan.dense, plan.source.manifest, lambda: None)
        if self.precision == "int4":
            greedy = own_greedy(folder, greedy)
        return {**greedy, "checkpoint_dtype": DTYPES[self.precision]}


def _built(plan: OnnxPlan, folder: Path) -> list[str]:
    """The files that a build leaves, the graph last, without those that are then passed on from the checkpoint."""
    passed_on = {"config.json", *(path.relative_to(plan.dense).as_posix() for path in companions_of(plan.dense))}
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - passed_on
    return [*sorted(names - {GRAPH_NAME}), GRAPH_NAME]
