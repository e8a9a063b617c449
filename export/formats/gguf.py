"""Export `gguf`: one file for llama.cpp, and for all that is built on it.

It is written with the `gguf` library, tensor by tensor, and read back: every entry, every tensor and the logits of what
the file holds. llama.cpp itself is not needed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from ...errors import ParityError
from ...extras import require
from ...model.decoder import PROOF_DTYPE, Decoder
from ...model.proof import PARITY_TOLERANCE, walk_logits
from ...pattern import parse_record
from ...progress import Meter
from ...pruning.config import PruneConfig
from ...store.audit import check_pattern
from ...store.companions import companions_of
from ...store.files import disk_errors
from ...store.gguf import check_gguf
from ...store.manifest import Manifest, TensorRecord, sha256_file
from ...store.pieces import Pieces
from ...structural.check import is_structural
from ..frame import usage
from ..frame.exporter import Exporter, Source, Words, Written
from ..frame.greedy import GREEDY_TOKENS, greedy_of
from ..llamacpp.architecture import Architecture, Field, Stored, architecture_of, tensors_of
from ..llamacpp.vocabulary import vocabulary_of
from ..llamacpp.weights import (
    TYPES,
    FileReader,
    bytes_of_type,
    check_type,
    chosen,
    decode,
    encode,
    rounding,
    type_of,
)
from .unpacking import as_dense

FILE: Final = "model.gguf"
PROBE_TOKENS: Final = 64
_TERMS: Final = re.compile(r"(?i:licen[cs]e|copying|copyright|notice|use_policy)[^/]*")
_TRUTH: Final = (
    "One file for llama.cpp and what is built on it. llama.cpp stores zeros like any other value and multiplies by "
    "them: a pattern of zeros made this file neither smaller nor faster."
)


@dataclass(frozen=True)
class GgufPlan:
    """folder: the dense one. fields: every entry of the file. types: of each tensor, as `TYPES` has them."""

    source: Source
    decoder: Decoder
    architecture: Architecture
    fields: dict[str, Field]
    stored: list[Stored]
    types: dict[str, str]
    limits: list[str]


@dataclass(frozen=True)
class Gguf(Exporter[GgufPlan]):
    """A GGUF file. quantise: the type of its matrices."""

    quantise: str = "auto"

    name: ClassVar[str] = "gguf"
    reads: ClassVar[tuple[str, ...]] = ("dense", "packed")
    suffixes: ClassVar[tuple[str, ...]] = (".gguf",)
    stale: ClassVar[tuple[str, ...]] = ("left_dense", "greedy")
    needs_manifest: ClassVar[bool] = False
    words: ClassVar[Words] = Words(_TRUTH, tags=("gguf",), use=usage.GGUF, library="llama-cpp-python")

    def check(self) -> None:
        check_type(self.quantise)
        require("writing a GGUF file", "gguf")

    def check_pruning(self, model: Path, config: PruneConfig) -> None:
        architecture = architecture_of(model)
        vocabulary_of(model, _rows(architecture))

    def weights(self, source: Source, folder: Path) -> AbstractContextManager[Path]:
        return as_dense(source, folder)

    def plan(self, source: Source, weights: Path) -> GgufPlan:
        architecture = architecture_of(weights)
        vocabulary, said = vocabulary_of(weights, _rows(architecture))
        decoder = Decoder(weights)
        stored = tensors_of(decoder, architecture)
        name = chosen(self.quantise, decoder.dtype)
        types = {each.name: type_of(each, name) for each in stored}
        limits = [*architecture.limits, *said]
        if odd := sum(types[each.name] == "f16" for each in stored) if TYPES[name].levels else 0:
            limits.append(f"{odd} matrices stay in F16: their rows are no whole blocks of 32")
        fields = {**_general(source.manifest, name), **architecture.fields, **vocabulary}
        return GgufPlan(source, decoder, architecture, fields, stored, types, limits)

    def room(self, plan: GgufPlan) -> int:
        return sum(bytes_of_type(each.shape, plan.types[each.name]) for each in plan.stored)

    def steps(self, plan: GgufPlan) -> int:
        return 2 * len(plan.stored) + GREEDY_TOKENS

    def write(self, plan: GgufPlan, folder: Path, tick: Meter, pieces: Pieces) -> Written:
        from gguf import GGMLQuantizationType, GGUFWriter

        known = pieces.file(folder, FILE, [each.name for each in plan.stored])
        if known is not None:
            for _ in plan.stored:
                tick.before()
            return Written(fingerprints=known, hashes={FILE: sha256_file(folder / FILE)})
        writer = GGUFWriter(str(folder / FILE), plan.architecture.kind.name)
        for name, value in plan.fields.items():
            _add(writer, name, value)
        sizes = [(each.name, each.shape, plan.types[each.name]) for each in plan.stored]
        for name, shape, kind in [*sizes, *((name, extra.shape, "f32") for name, extra in _extra(plan))]:
            dtype = GGMLQuantizationType[TYPES[kind].name]
            writer.add_tensor_info(name, shape, np.dtype(np.float32), bytes_of_type(shape, kind), raw_dtype=dtype)
        fingerprints = {}
        with disk_errors(folder), _closed(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for each in plan.stored:
                encoded = encode(each, plan.decoder.reader.load_finite(each.key), plan.types[each.name])
                writer.write_tensor_data(encoded)
                fingerprints[each.name] = hashlib.sha256(encoded.tobytes()).hexdigest()
                tick()
            for _, extra in _extra(plan):
                writer.write_tensor_data(extra)
        with disk_errors(folder), (folder / FILE).open("rb+") as file:
            os.fsync(file.fileno())
        sha256 = sha256_file(folder / FILE)
        pieces.note_file(FILE, sha256, fingerprints)
        return Written(fingerprints=fingerprints, hashes={FILE: sha256})

    def companions(self, plan: GgufPlan, weights: Path, folder: Path) -> None:
        for path in companions_of(weights):
            if _TERMS.fullmatch(path.name):
                with disk_errors(folder):
                    shutil.copyfile(path, folder / path.name)

    def compare(self, plan: GgufPlan, written: Written, folder: Path, tick: Meter) -> Written:
        from gguf import GGUFReader

        place = folder / FILE
        check_gguf(place)
        file = GGUFReader(str(place))
        _check_fields(place, file, plan.fields)
        entries = {entry.name: entry for entry in file.tensors}
        errors: dict[str, float] = {}
        zeros: dict[str, int] = {}
        for each in plan.stored:
            entry, name = entries[each.name], plan.types[each.name]
            if hashlib.sha256(entry.data.tobytes()).hexdigest() != written.fingerprints[each.name]:
                raise ParityError(f"{place}: '{each.name}' on disk holds other bits than were written")
            read = decode(each, entry)
            errors[each.name] = rounding(f"{place}: '{each.name}'", plan.decoder.reader.load(each.key), read, name)
            if each.key in plan.source.manifest.tensors:
                zeros[each.key] = _zeros(each.key, read, plan.source.manifest.tensors[each.key])
            tick()
        exact = not any(errors.values())
        record = {
            "file": FILE,
            "architecture": plan.architecture.kind.name,
            "types": dict(Counter(TYPES[kind].name for kind in plan.types.values())),
            "exact": exact,
            "mean_relative_error": sum(errors.values()) / len(errors),
            "limits": plan.limits,
            "parity": _parity(plan, entries, exact=exact),
        }
        greedy = {"greedy": greedy_of(plan.decoder.reader.root, plan.source.manifest, tick)} if exact else {}
        pruned, reader = plan.source.manifest.tensors, plan.decoder.reader
        tensors = {key: old.recounted(key, zeros[key], reader.info(key).shape) for key, old in pruned.items()}
        return replace(written, metrics={"gguf": record, **greedy}, tensors=tensors)

    def size(self, plan: GgufPlan, folder: Path) -> Mapping[str, Any]:
        before = sum(path.stat().st_size for path in plan.decoder.reader.files)
        after = (folder / FILE).stat().st_size
        return {
            "file_bytes_over_dense": after / before,
            "weight_bytes_over_dense": after / before,
            "what": "bytes of the GGUF file over the checkpoint's weight files; zeros are stored",
        }

    def words_of(self, manifest: Manifest) -> Words:
        truth = f"{_TRUTH} Removing whole heads and neurons did." if is_structural(manifest) else _TRUTH
        types = ", ".join(f"{count} {name}" for name, count in manifest.metrics["gguf"]["types"].items())
        rounded = "" if manifest.metrics["gguf"]["exact"] else "quantised as GGUF"
        return replace(self.words, truth=f"{truth} Its tensors: {types}.", done=rounded or None)


def _rows(architecture: Architecture) -> int:
    rows = architecture.fields[f"{architecture.kind.name}.vocab_size"]
    assert isinstance(rows, int)
    return rows


def _general(manifest: Manifest, name: str) -> dict[str, Field]:
    """What the file says of itself and where it comes from."""
    from gguf import GGML_QUANT_VERSION

    origin = Path(manifest.source.id).name or manifest.source.id
    done = f", {manifest.config['method']} {manifest.config['pattern'] or ''}".rstrip() if manifest.tensors else ""
    licence: dict[str, Field] = {"general.license": manifest.source.license} if manifest.source.license else {}
    return {
        "general.type": "model",
        "general.name": origin,
        "general.description": f"{origin}{done}, by crepe-deploy {manifest.versions['crepe-deploy']}",
        **licence,
        "general.file_type": TYPES[name].file_type,
        "general.quantization_version": GGML_QUANT_VERSION,
    }


def _add(writer: Any, name: str, value: Field) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _extra(plan: GgufPlan) -> list[tuple[str, Any]]:
    return list(plan.architecture.extra.items())


@contextmanager
def _closed(writer: Any) -> Iterator[None]:
    try:
        yield
    finally:
        writer.close()


def _check_fields(place: Path, file: Any, fields: Mapping[str, Field]) -> None:
    """Raise ParityError unless the file says what was meant, numbers as float32 has them."""
    for name, value in fields.items():
        meant: Any = value
        if isinstance(value, float) or (isinstance(value, list) and value and isinstance(value[0], float)):
            meant = np.asarray(value, dtype=np.float32).tolist()
        if name not in file.fields or file.fields[name].contents() != meant:
            raise ParityError(f"{place}: '{name}' is not what was written")


def _zeros(key: str, read: Tensor, record: TensorRecord) -> int:
    """The zeros of a pruned tensor, which hold its pattern: rounding adds some. Raises PatternError."""
    check_pattern(key, read, parse_record(record.pattern))
    return int((read == 0).sum())


def _parity(plan: GgufPlan, entries: dict[str, Any], *, exact: bool) -> dict[str, Any]:
    """The logits of the file's weights against the checkpoint's. Raises ParityError where they should be the same."""
    source = Decoder(plan.decoder.reader.root, PROOF_DTYPE)
    length = min(PROBE_TOKENS, source.context_length)
    tokens = torch.randint(source.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    expected = walk_logits(source, tokens)
    source.reader = FileReader(plan.decoder.reader.root, entries, plan.stored)
    found = walk_logits(source, tokens)
    difference = float((found - expected).abs().max())
    tolerance = PARITY_TOLERANCE * max(1.0, float(expected.abs().max())) if exact else None
    if not np.isfinite(difference) or (tolerance is not None and difference > tolerance):
        raise ParityError(f"the GGUF file's logits differ from the checkpoint's by {difference:.3g}")
    log = [torch.log_softmax(logits, -1) for logits in (expected, found)]
    return {
        "max_abs_logit_difference": difference,
        "tolerance": tolerance,
        "mean_kl": float((log[0].exp() * (log[0] - log[1])).sum(-1).mean()),
        "same_best_token": float((expected.argmax(-1) == found.argmax(-1)).float().mean()),
        "tokens": length,
        "what": "logits of the weights as the file holds them against the checkpoint's, on random tokens",
    }
