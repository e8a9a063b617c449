"""Text for calibration and evaluation alike: local `.txt`, `.jsonl`, `.parquet`, or a `datasets` name.

A `datasets` source is written `NAME`, `NAME:SPLIT`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT` (`NAME::SPLIT` without a
config); with two parts the second is a split where it starts with train, valid, test or dev. NAME may be a folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CalibrationError, CheckpointError, ConfigError, MissingExtra
from .limits import MOST, check_seed
from .model.families import family_of
from .store.checkpoint import read_config
from .store.stock import tokenizer_of

SEPARATOR = "\n\n"
DATASET_MAX_CHARS = 50_000_000
CHARS_PER_TOKEN = 16
MIN_CHARS = 2_000_000
FILE_KINDS = (".txt", ".jsonl", ".parquet")
_SPLIT_NAMES = ("train", "valid", "test", "dev")


@dataclass(frozen=True)
class Text:
    """Documents read from one source.

    sha256: of the file's bytes; for a `datasets` source of the joined UTF-8 text that was read.
    truncated: the dataset held more than the characters asked for.
    """

    source: str
    documents: list[str]
    sha256: str
    truncated: bool = False

    @property
    def joined(self) -> str:
        """All documents, separated by a blank line."""
        return SEPARATOR.join(self.documents)


@dataclass(frozen=True)
class CalibrationSet:
    """Token windows for calibration.

    tokens: int64 (samples, length). text_tokens: how many tokens the windows were drawn from.
    rule: how they were drawn, in words. bos: "none", or "window" where each window starts with BOS.
    parts: where several sources were mixed, each one's source, sha256, samples and text_tokens; `sha256` is then of
    theirs, one after the other.
    """

    tokens: Tensor
    source: str
    sha256: str
    field: str
    seed: int
    text_tokens: int
    rule: str
    bos: str
    parts: tuple[dict[str, Any], ...] = ()

    @property
    def token_count(self) -> int:
        """Tokens in all windows."""
        return self.tokens.numel()

    def record(self) -> dict[str, Any]:
        """Everything but the tokens, for a manifest."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "field": self.field,
            "samples": self.tokens.shape[0],
            "length": self.tokens.shape[1],
            "token_count": self.token_count,
            "text_tokens": self.text_tokens,
            "seed": self.seed,
            "rule": self.rule,
            "bos": self.bos,
            **({"parts": list(self.parts)} if self.parts else {}),
        }


def load_text(
    source: str | Path, field: str = "text", split: str = "train", max_chars: int = DATASET_MAX_CHARS
) -> Text:
    """Read every document of a source; `split` is a dataset's split where the source names none.

    A dataset is streamed, and no further than the document that reaches `max_chars` characters.
    Raises CalibrationError (missing, unreadable, not UTF-8, a bad line, no such field, no text) and MissingExtra.
    """
    path = Path(source)
    if path.suffix in FILE_KINDS or path.is_file():
        text = _load_file(path, field)
    else:
        text = _load_dataset(str(source), field, split, max_chars)
    if not any(document.strip() for document in text.documents):
        raise CalibrationError(f"{source} holds no text")
    return text


def load_documents(source: str | Path, field: str = "text") -> list[str]:
    """The documents of a source; a `.txt` file is one document. Raises as `load_text` does."""
    return load_text(source, field).documents


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises NoTokenizer, and CheckpointError where it is damaged."""
    return tokenizer_of(folder)


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a whole text, int64 (tokens,), without any special token added."""
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def wants_bos_each_window(tokenizer: Any) -> bool:
    """Whether the model beside this tokenizer needs BOS in front of every text; CheckpointError if there is no BOS."""
    path = Path(tokenizer.name_or_path) / "config.json"
    content = read_config(path.parent) if path.exists() else {}
    kind = (content.get("text_config") or content).get("model_type", "")
    if family_of(kind).bos and tokenizer.bos_token_id is None:
        raise CheckpointError(f"{path}: model type '{kind}' needs BOS before every text, and its tokenizer has none")
    return family_of(kind).bos


def calibration_windows(
    source: str | Path | Text | Sequence[str | Path],
    tokenizer: Any,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    field: str = "text",
) -> CalibrationSet:
    """Draw `samples` windows of `length` tokens from a source, at random without overlap, by a generator of its own.

    Documents are joined by blank lines and tokenised without special tokens, though each window starts with BOS where
    the family needs it. A text far longer than wanted is first cut to CHARS_PER_TOKEN characters a token, or MIN_CHARS.
    Of several sources each gives as many windows as the others (the first ones one more where that does not come out
    even), in one random order.
    Raises CalibrationError saying how many tokens are missing, ConfigError, and as `load_text` does.
    """
    check_seed(seed)
    if samples < 1 or length < 2 or samples * length > MOST:
        raise ConfigError(
            f"{samples} calibration samples of {length} tokens: it must be 1 of 2, and {MOST} tokens at most"
        )
    if isinstance(source, (str, Path, Text)):
        return _windows(source, tokenizer, samples, length, seed, field)
    names = [str(one) for one in source]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"calibration sources must be given, and each once: {', '.join(names) or 'none is'}")
    if len(names) == 1:
        return _windows(names[0], tokenizer, samples, length, seed, field)
    if samples < len(names):
        raise ConfigError(f"{samples} calibration samples cannot come from {len(names)} sources: raise the samples")
    share, more = divmod(samples, len(names))
    return _mixed([
        _windows(name, tokenizer, share + (index < more), length, seed, field) for index, name in enumerate(names)
    ])  # fmt: skip


def _mixed(sets: list[CalibrationSet]) -> CalibrationSet:
    order = torch.randperm(
        sum(len(part.tokens) for part in sets), generator=torch.Generator().manual_seed(sets[0].seed)
    )
    kept = ("source", "sha256", "samples", "text_tokens")
    return replace(
        sets[0],
        tokens=torch.cat([part.tokens for part in sets])[order],
        source=" + ".join(part.source for part in sets),
        sha256=hashlib.sha256("".join(part.sha256 for part in sets).encode()).hexdigest(),
        text_tokens=sum(part.text_tokens for part in sets),
        rule=f"equal shares in random order; each: {sets[0].rule}",
        parts=tuple({name: part.record()[name] for name in kept} for part in sets),
    )


def _windows(
    source: str | Path | Text, tokenizer: Any, samples: int, length: int, seed: int, field: str
) -> CalibrationSet:
    bos = wants_bos_each_window(tokenizer)
    body = length - 1 if bos else length
    if isinstance(source, Text):
        text = source
    else:
        text = load_text(source, field, max_chars=max(MIN_CHARS, CHARS_PER_TOKEN * samples * body))
    ids, rule = _enough_tokens(tokenizer, text, samples * body)
    windows = draw_windows(ids, samples, body, seed)
    if bos:
        windows = torch.cat([torch.full((samples, 1), tokenizer.bos_token_id), windows], dim=1)
    return CalibrationSet(
        tokens=windows,
        source=text.source,
        sha256=text.sha256,
        field=field,
        seed=seed,
        text_tokens=ids.numel(),
        rule=rule,
        bos="window" if bos else "none",
    )


def draw_windows(ids: Tensor, samples: int, length: int, seed: int) -> Tensor:
    """Cut `samples` non-overlapping windows (samples, length) out of `ids` (tokens,) at random places, random order.

    The slack between the windows is drawn uniformly; all windows together need `samples * length` tokens, which the
    caller has made sure of. Deterministic by `seed`; the global generators are not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    slack = ids.numel() - samples * length
    gaps = torch.randint(slack + 1, (samples,), generator=generator).sort().values
    starts = gaps + torch.arange(samples) * length
    starts = starts[torch.randperm(samples, generator=generator)]
    return ids[starts[:, None] + torch.arange(length)]


def _enough_tokens(tokenizer: Any, text: Text, wanted: int) -> tuple[Tensor, str]:
    whole = text.joined
    cut = max(MIN_CHARS, CHARS_PER_TOKEN * wanted)
    ids = tokenize(tokenizer, whole[:cut])
    used = "the text" if len(whole) <= cut and not text.truncated else f"the first {cut} characters"
    if ids.numel() < wanted and len(whole) > cut:
        ids, used = tokenize(tokenizer, whole), "the text"
    if ids.numel() < wanted:
        raise CalibrationError(
            f"{text.source} has {ids.numel()} tokens and {wanted} are needed: {wanted - ids.numel()} are missing; "
            f"give more text, fewer samples or shorter ones"
        )
    return ids, f"{used}, documents joined by blank lines, windows at random places without overlap"


def _load_file(path: Path, field: str) -> Text:
    if path.suffix not in FILE_KINDS:
        raise CalibrationError(f"{path} is not one of the kinds that can be read: {', '.join(FILE_KINDS)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror or error}") from error
    if not data:
        raise CalibrationError(f"{path} is empty")
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix == ".parquet":
        return Text(str(path), _read_parquet(path, field), digest)
    content = _decode(path, data)
    documents = [content] if path.suffix == ".txt" else list(_json_lines(path, content, field))
    return Text(str(path), documents, digest)


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; convert it to UTF-8"
        ) from error


def _json_lines(path: Path, content: str, field: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path} line {number} is not JSON: {error}") from error
        yield _field_of(row, field, f"{path} line {number}")


def _field_of(row: Any, field: str, place: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if isinstance(value, str):
        return value
    fields = f"its fields are {', '.join(map(str, row))}" if isinstance(row, dict) else "it is no object"
    raise CalibrationError(f"{place} has no text in field '{field}': {fields}")


def _read_parquet(path: Path, field: str) -> list[str]:
    if importlib.util.find_spec("pyarrow") is None:
        raise MissingExtra("pyarrow", "eval", "reading a .parquet file")
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if field not in names:
            raise CalibrationError(f"{path} has no column '{field}': its columns are {', '.join(names)}")
        values = pyarrow.parquet.read_table(path, columns=[field]).column(field).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} is not a parquet file that can be read: {error}") from error
    return [_field_of({field: value}, field, f"{path} row {row}") for row, value in enumerate(values)]


def parse_dataset_name(source: str, split: str) -> tuple[str, str | None, str]:
    """Split `NAME[:CONFIG][:SPLIT]` into its parts; `split` where none is named. Raises CalibrationError."""
    name, *rest = source.split(":")
    if not name or len(rest) > 2:
        raise CalibrationError(f"'{source}' is no file and no dataset name of the form NAME[:CONFIG][:SPLIT]")
    if len(rest) == 2:
        return name, rest[0] or None, rest[1] or split
    if rest and rest[0].startswith(_SPLIT_NAMES):
        return name, None, rest[0]
    return name, rest[0] if rest else None, split


def _load_dataset(source: str, field: str, split: str, max_chars: int) -> Text:
    name, config, split = parse_dataset_name(source, split)
    if importlib.util.find_spec("datasets") is None:
        raise MissingExtra("datasets", "eval", f"'{source}' is no file on this disk; reading it as a dataset")
    import httpx
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        rows = load_dataset(name, config, split=split, streaming=True)
        documents, truncated = _take(rows, field, source, max_chars)
    except (OSError, ValueError, KeyError, DatasetsError, HfHubHTTPError, httpx.HTTPError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"'{source}' is no file on this disk, and dataset '{name}' (config {config}, split {split}) could not be "
            f"read: {reason}"
        ) from error
    digest = hashlib.sha256(SEPARATOR.join(documents).encode()).hexdigest()
    return Text(source, documents, digest, truncated)


def _take(rows: Iterable[Any], field: str, source: str, max_chars: int) -> tuple[list[str], bool]:
    documents: list[str] = []
    chars = 0
    for number, row in enumerate(rows):
        if chars >= max_chars:
            return documents, True
        documents.append(_field_of(row, field, f"{source} row {number}"))
        chars += len(documents[-1])
    return documents, False
