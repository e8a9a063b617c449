"""Documents read from one source: local `.txt`, `.jsonl`, `.parquet`, or a `datasets` name; files of any size.

A `datasets` source is written `NAME`, `NAME:SPLIT`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT` (`NAME::SPLIT` without a
config); with two parts the second is a split where it starts with train, valid, test or dev. NAME may be a folder.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from .errors import CalibrationError
from .extras import require
from .store.reading import DOCUMENT_BYTES, decode, is_folder, open_file, parse_json, refuse_lost_link
from .store.stock import third_party

SEPARATOR: Final = "\n\n"
DATASET_MAX_CHARS: Final = 50_000_000
FILE_KINDS: Final = (".txt", ".jsonl", ".parquet")
_SPLIT_NAMES = ("train", "valid", "test", "dev")
_CHUNK: Final = 1 << 20
_PARQUET: Final = "reading a .parquet file"


@dataclass(frozen=True)
class Text:
    """Documents read from one source.

    sha256: of the file's bytes; for a `datasets` source of the joined UTF-8 text that was read.
    truncated: there is more than the characters asked for.
    """

    source: str
    documents: list[str]
    sha256: str
    truncated: bool = False

    @property
    def joined(self) -> str:
        """All documents, separated by a blank line."""
        return SEPARATOR.join(self.documents)


def load_text(
    source: str | Path,
    field: str = "text",
    split: str = "train",
    max_chars: int = DATASET_MAX_CHARS,
    file_chars: int | None = None,
) -> Text:
    """Read the documents of a source; `split` is a dataset's split where the source names none.

    A dataset is streamed, and no further than the document that reaches `max_chars` characters; a file, of which only
    the digest is taken to its end, to `file_chars` (None: all of it, in memory).
    Raises CalibrationError (missing, unreadable, not UTF-8, a bad line, no such field, no text) and MissingExtra.
    """
    path = Path(source)
    if path.suffix in FILE_KINDS or _is_file(path):
        text = _load_file(path, field, file_chars)
    else:
        refuse_lost_link(path, CalibrationError)
        text = _load_dataset(str(source), field, split, max_chars)
    if not any(document.strip() for document in text.documents) and not text.truncated:
        raise CalibrationError(f"{source} holds no text")
    return text


def check_text(source: str | Path) -> None:
    """Refuse a source that shows without reading that it has no text: missing, empty, of no kind that is read.

    Raises CalibrationError, MissingExtra.
    """
    path = Path(source)
    if path.suffix not in FILE_KINDS and not _is_file(path):
        parse_dataset_name(str(source), "train")
        require(_no_file(source), "datasets")
        return
    _check_kind(path)
    if not path.exists():
        raise CalibrationError(
            f"{path} is missing: text comes from a file ({', '.join(FILE_KINDS)}) or the name of a dataset, and with "
            "--calib self from the model itself"
        )
    with open_file(path, CalibrationError) as file:
        if not os.fstat(file.fileno()).st_size:
            raise CalibrationError(f"{path} is empty")
    if path.suffix == ".parquet":
        require(_PARQUET, "pyarrow")


def _check_kind(path: Path) -> None:
    if path.suffix not in FILE_KINDS:
        raise CalibrationError(f"{path} is not one of the kinds that can be read: {', '.join(FILE_KINDS)}")


def _no_file(source: str | Path) -> str:
    return f"'{source}' is no file on this disk; reading it as a dataset"


def _is_file(path: Path) -> bool:
    """Whether something lies there that is no folder; nothing does under a name that is too long for a file."""
    try:
        return path.exists() and not path.is_dir()
    except OSError:
        return False


def load_documents(source: str | Path, field: str = "text") -> list[str]:
    """The documents of a source; a `.txt` file is one document. Raises as `load_text` does."""
    return load_text(source, field).documents


def _load_file(path: Path, field: str, chars: int | None) -> Text:
    _check_kind(path)
    with open_file(path, CalibrationError) as file:
        try:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if not file.tell():
                raise CalibrationError(f"{path} is empty")
            file.seek(0)
            if path.suffix == ".txt":
                return _read_plain(path, file, digest, chars)
            rows = _json_lines(path, file, field) if path.suffix == ".jsonl" else _parquet_rows(path, file, field)
            documents, truncated = _first(rows, chars)
            return Text(str(path), documents, digest, truncated)
        except OSError as error:
            raise CalibrationError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_plain(path: Path, file: BinaryIO, digest: str, chars: int | None) -> Text:
    """One document: the first `chars` characters, though the file is looked through to its end for what is no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    parts: list[str] = []
    length = offset = 0
    truncated = False
    while chunk := file.read(_CHUNK):
        pending = len(decoder.getstate()[0])
        part = _decoded(path, decoder, chunk, offset - pending)
        part = part.removeprefix("\ufeff") if not offset else part
        offset += len(chunk)
        keep = len(part) if chars is None else min(len(part), chars - length)
        truncated |= keep < len(part)
        parts += [part[:keep]] if keep else []
        length += keep
    _decoded(path, decoder, b"", offset - len(decoder.getstate()[0]))
    return Text(str(path), ["".join(parts)], digest, truncated)


def _decoded(path: Path, decoder: codecs.IncrementalDecoder, chunk: bytes, start: int) -> str:
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {start + error.start}; "
            f"convert it to UTF-8"
        ) from error


def _first(rows: Iterator[str], chars: int | None) -> tuple[list[str], bool]:
    """The documents up to the one that reaches so many characters, and whether there are more."""
    documents: list[str] = []
    length = 0
    for document in rows:
        if chars is not None and length >= chars:
            return documents, True
        documents.append(document)
        length += len(document)
    return documents, False


def _json_lines(path: Path, file: BinaryIO, field: str) -> Iterator[str]:
    number = 0
    while line := file.readline(DOCUMENT_BYTES + 1):
        number += 1
        place = f"{path} line {number}"
        if len(line) > DOCUMENT_BYTES:
            raise CalibrationError(f"{place} is longer than {DOCUMENT_BYTES} bytes")
        if content := decode(line, place, CalibrationError).strip():
            yield _field_of(parse_json(content, place, CalibrationError, lenient=True), field, place)


def _field_of(row: Any, field: str, place: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if isinstance(value, str):
        return value
    fields = f"its fields are {', '.join(map(str, row))}"[:500] if isinstance(row, dict) else "it is no object"
    raise CalibrationError(f"{place} has no text in field '{field}': {fields}")


def _parquet_rows(path: Path, file: BinaryIO, field: str) -> Iterator[str]:
    require(_PARQUET, "pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if names.count(field) != 1:
            raise CalibrationError(f"{path} has no column '{field}': its columns are {', '.join(names)[:500]}")
        number = 0
        for batch in table.iter_batches(256, columns=[field]):
            for value in batch.column(0):
                yield _field_of({field: value.as_py()}, field, f"{path} row {number}")
                number += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError, NotImplementedError) as error:
        # all that pyarrow has been seen to raise of a damaged file
        raise CalibrationError(f"{path} is not a parquet file that can be read: {error}") from error


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
    require(_no_file(source), "datasets")
    from datasets import load_dataset

    what = (
        f"'{source}' is no file on this disk, and dataset '{name}' (config {config}, split {split}) could not be read"
    )
    if is_folder(Path(name)):
        what = (
            f"'{name}' is a folder, in which split {split} of a dataset was looked for: name a file in it "
            f"({', '.join(FILE_KINDS)}) or '{name}::SPLIT'; it could not be read"
        )
    if not name.strip("/"):
        raise CalibrationError(f"{what}: that is the root of the file system")
    with third_party(what, CalibrationError):
        rows = load_dataset(name, config, split=split, streaming=True)
        documents, truncated = _take(rows, field, source, max_chars)
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
