"""What a person gives, made into what the core takes: a model, a pattern, calibration tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from crepe_deploy.device import CPU
from crepe_deploy.documents import SEPARATOR, Text, check_text
from crepe_deploy.errors import CalibrationError, ConfigError
from crepe_deploy.model.architecture import load_config
from crepe_deploy.model.gguf_outline import gguf_outline
from crepe_deploy.pattern import NM, Pattern, Unstructured, parse_pattern
from crepe_deploy.progress import Say, Show, hidden, unsaid
from crepe_deploy.selftext import SELF
from crepe_deploy.store.folders import check_output, held
from crepe_deploy.store.hub import hub_outline
from crepe_deploy.store.sources import Model, gguf_file, is_hub_id, is_model_name, require_pinned, resolve_model
from crepe_deploy.store.stock import check_ids
from crepe_deploy.texts import CalibrationSet, calibration_windows, load_tokenizer

Granularity = Literal["row", "matrix"]


@dataclass(frozen=True)
class Mixture:
    """Several sources of text, files or `datasets` names, that give equal shares of the calibration windows."""

    sources: Sequence[str | Path]


Calibration = str | Path | Mixture | Sequence[str] | Tensor | CalibrationSet


def find_model(model: str | Path, revision: str | None = None, say: Say | None = None) -> Model:
    """A folder, a GGUF file (dequantised once, into the cache) or a hub id (fetched). CheckpointError, ConfigError."""
    source = resolve_model(str(model), revision, say or unsaid)
    require_pinned(revision, source)
    return source


@contextmanager
def outlined(model: str | Path, revision: str | None, say: Say | None) -> Iterator[tuple[Path, str]]:
    """A folder that says what a model is, and where that comes from: of a GGUF file its header alone, outlined, and
    of a model on the hub its configuration and headers.

    Raises CheckpointError, ConfigError, UnsupportedModel, MissingExtra.
    """
    file = gguf_file(str(model))
    if file is None and is_model_name(str(model)):
        with hub_outline(str(model), revision, say or unsaid) as folder:
            yield folder, str(model)
        return
    if file is None:
        folder = find_model(model, revision, say).folder
        yield folder, str(folder)
        return
    require_pinned(revision, Model(file, "gguf", str(file), None, {}))
    with gguf_outline(file, say or unsaid) as folder:
        yield folder, str(file)


def sources_of(calib: Calibration | None) -> list[str | Path]:
    """Where text comes from that is not given as it is."""
    several = calib.sources if isinstance(calib, Mixture) else [calib]
    return [source for source in several if isinstance(source, str | Path)]


def check_calibration(*given: Calibration | None) -> None:
    """Refuse sources of text that show without reading that they have none. Raises CalibrationError, MissingExtra."""
    for source in (source for calib in given for source in sources_of(calib)):
        if source != SELF:
            check_text(source)


def check_place(out: str | Path, model: str | Path, *, overwrite: bool, own: tuple[str, ...] = ()) -> None:
    """Refuse an output folder before MODEL is fetched or converted; own: as of `check_output`. Raises OutputError."""
    given = Path(os.path.expanduser(model))  # noqa: PTH111 - this one raises nothing
    check_output(Path(out), overwrite=overwrite, inputs=(given,) if os.path.lexists(given) else (), own=own)


@contextmanager
def output(out: str | Path, model: str | Path, *, overwrite: bool, own: tuple[str, ...] = ()) -> Iterator[None]:
    """What `check_place` does; inside, the output is this run's alone. Raises OutputError."""
    check_place(out, model, overwrite=overwrite, own=own)
    with held(Path(out)):
        yield


def pattern_of(sparsity: Pattern | str | float, granularity: Granularity = "row") -> Pattern:
    """The pattern of "2:4" (N kept of M), or of 0.5 or "0.5" of zeros, counted by row or matrix. PatternError."""
    if isinstance(sparsity, NM | Unstructured):
        return sparsity
    return parse_pattern(str(sparsity), granularity)


def check_base_model(base_model: str | None) -> None:
    """Refuse for the card what is no hub id, owner/name. Raises ConfigError."""
    if base_model is not None and not is_hub_id(base_model):
        raise ConfigError(f"--base-model {base_model} is no hub id of the form owner/name")


def export_options(onnx_flavor: str | None, precision: str | None, quantise: str | None = None) -> dict[str, str]:
    """What was given of the options of export formats, by the names that the formats have for them."""
    options = {"flavor": onnx_flavor, "precision": precision, "quantise": quantise}
    return {name: value for name, value in options.items() if value is not None}


def windows_of(
    model: Model, calib: Calibration, field: str, samples: int, length: int, seed: int, say: Say | None = None,
    show: Show | None = None, device: torch.device = CPU,
) -> CalibrationSet:  # fmt: skip
    """Calibration windows of a source, of documents, or as given.

    calib: a file or `datasets` name, "self" for text that the model writes (say is told so); a `Mixture` of those;
    documents; token ids, integer (samples, length), which are taken as they are. length: clipped to the model's
    context. show: wraps the writing, which `device` does. Raises CalibrationError, CheckpointError, ConfigError,
    MissingExtra.
    """
    if isinstance(calib, CalibrationSet):
        return _varied(calib)
    config = load_config(model.folder)
    rows = int(config.get_text_config().vocab_size)
    if isinstance(calib, Tensor):
        return _varied(_as_given(calib, rows, seed))
    source = calib if isinstance(calib, str | Path) else _several(calib)
    context = int(getattr(config, "max_position_embeddings", None) or length)
    if context < length:
        (say or unsaid)(f"calibration windows are clipped to the model's context: {context} tokens instead of {length}")
    tokenizer = load_tokenizer(model.folder)
    windows = calibration_windows(
        source, tokenizer, samples, min(length, context), seed, field, say or unsaid, show or hidden, device
    )
    check_ids(tokenizer, windows.tokens.flatten().tolist(), rows)
    return _varied(windows)


def _varied(windows: CalibrationSet) -> CalibrationSet:
    """The same. Raises CalibrationError for windows of one token over and over behind BOS, padding for example."""
    body = windows.tokens[:, 1:] if windows.tokens.shape[1] > 2 else windows.tokens
    if bool((body == body[0, 0]).all()):
        raise CalibrationError(
            f"{windows.source}: its windows hold nothing but token {int(body[0, 0])} over and over, from which nothing "
            "can be learned about a model: give other text"
        )
    return windows


def _several(calib: Mixture | Sequence[str]) -> Sequence[str | Path] | Text:
    if isinstance(calib, Mixture):
        return list(calib.sources)
    documents = list(calib)
    if not all(isinstance(document, str) for document in documents):
        raise ConfigError("calibration documents are strings; for several files or datasets give Mixture([...])")
    if not any(document.strip() for document in documents):
        raise CalibrationError("the calibration documents hold no text")
    digest = hashlib.sha256(SEPARATOR.join(documents).encode()).hexdigest()
    return Text(f"{len(documents)} documents given", documents, digest)


def _as_given(tokens: Tensor, vocabulary: int, seed: int) -> CalibrationSet:
    if tokens.ndim != 2 or tokens.numel() == 0 or tokens.shape[1] < 2:
        raise CalibrationError(f"calibration tokens have shape (samples, length >= 2), not {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise CalibrationError(f"calibration tokens are whole numbers, not {tokens.dtype}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise CalibrationError(f"calibration tokens are ids from 0 to {vocabulary - 1}, the model's vocabulary")
    ids = tokens.detach().to("cpu", torch.long).contiguous()
    return CalibrationSet(
        tokens=ids,
        source="tokens given",
        sha256=hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        field="",
        seed=seed,
        text_tokens=ids.numel(),
        rule="as given",
        bos="as given",
    )
