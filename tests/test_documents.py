"""Files of any size and any content: only what is needed is held, and what is no text is refused by a message."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from crepe_deploy import texts
from crepe_deploy.documents import load_text
from crepe_deploy.errors import CalibrationError, CrepeError
from crepe_deploy.texts import calibration_windows, first_tokens, tokenize
from tests.pico import pico_tokenizer, sample_text


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_a_prefix_is_that_of_the_whole_and_the_digest_too(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    documents = [f"the city {index} Größe 日本" for index in range(2000)]
    if kind == "txt":
        path.write_text("\ufeff" + "\n\n".join(documents), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path)
    whole = load_text(path)
    assert whole.joined == "\n\n".join(documents) and not whole.truncated
    for chars in (1, 77, 5000, 10**9):
        part = load_text(path, file_chars=chars)
        assert whole.joined.startswith(part.joined[:chars]) and len(part.joined) >= min(chars, len(whole.joined))
        assert part.truncated == (chars < 10**9)
        assert len(part.joined) <= 1.2 * chars + 50 and part.sha256 == whole.sha256
    assert whole.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("wanted", [2, 64, 1000])
@pytest.mark.parametrize("text", [sample_text(30_000), "ab" * 30_000, "a  b\n" * 9000, "日本" * 9000, "🤖é\r\n" * 9000])
def test_the_first_tokens_are_those_of_the_whole_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: int, text: str
) -> None:
    monkeypatch.setattr(texts, "MIN_CHARS", 1000)
    monkeypatch.setattr(texts, "SLACK", 32)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    tokenizer = pico_tokenizer()
    whole = tokenize(tokenizer, text)
    ids, _, total = first_tokens(tokenizer, tmp_path / "a.txt", "text", wanted)
    assert ids.tolist() == whole[:wanted].tolist()
    assert total in (None, whole.numel())
    assert first_tokens(tokenizer, tmp_path / "a.txt", "text", None)[0].tolist() == whole.tolist()


def test_calibration_grows_what_it_reads_until_it_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MIN_CHARS", 100)
    monkeypatch.setattr(texts, "CHARS_PER_TOKEN", 1)
    monkeypatch.setattr(texts, "WHOLE_CHARS", 0)
    (tmp_path / "a.txt").write_text(sample_text(30_000), encoding="utf-8")
    windows = calibration_windows(tmp_path / "a.txt", pico_tokenizer(), samples=4, length=64)
    assert "the first" in windows.rule and windows.tokens.shape == (4, 64)


def test_a_large_file_takes_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    """By what Python allocates: what the tokenizer's threads leave in a process differs by 130 MB from run to run."""
    page, tokenizer = sample_text(20_000), pico_tokenizer()
    peaks: dict[str, list[int]] = {".txt": [], ".jsonl": []}
    for megabytes in (3, 100):
        for suffix, held in peaks.items():
            path = tmp_path / f"{megabytes}{suffix}"
            document = page if suffix == ".txt" else json.dumps({"text": page}) + "\n"
            with path.open("w", encoding="utf-8") as file:
                file.writelines([document] * ((megabytes << 20) // len(document) + 1))
            tracemalloc.start()
            try:
                assert first_tokens(tokenizer, path, "text", 64)[0].numel() == 64
                calibration_windows(path, tokenizer, 2, 16)
                held.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
    for small, large in peaks.values():
        assert small > 1e6 and large - small < 5e6


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a"])
def test_a_fifo_or_a_device_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(CalibrationError, match=r"not a regular file|not one of the kinds"):
        load_text(tmp_path / name)
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    with pytest.raises(CalibrationError, match="not a regular file"):
        load_text(tmp_path / "zero.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "\\ud800"}', "line 1 is not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "5000 digits"),
        ("[" * 5000, "nested deeper"),
        ("{" + '"a": {' * 150 + "}" * 151, "nested deeper"),
    ],
)
def test_lines_that_no_reader_should_take_are_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(CalibrationError, match=message):
        load_text(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([1, 2]),
        pyarrow.array([b"\xff", b"a"]),
        pyarrow.array([["a"], ["b"]]),
        pyarrow.array([None, None]),
        pyarrow.array([b"\xff\xfe", b"a"]).view(pyarrow.string()),
        pyarrow.array([{"a": "b"}, {"a": "c"}]),
        pyarrow.array([True, False]),
    ],
    ids=str,
)
def test_columns_that_are_no_text_are_refused(tmp_path: Path, column: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(CrepeError, match=r"a\.parquet"):
        load_text(tmp_path / "a.parquet")


FOLDERS: dict[str, dict[str, bytes]] = {
    "front matter": {"README.md": b"---\n- a\n: :\n---\n", "a.txt": b"x"},
    "features": {"README.md": b"---\ndataset_info: {features: 7}\n---\n", "a.txt": b"x"},
    "infos": {"dataset_infos.json": b"[]", "a.txt": b"x"},
    "script": {"script.py": b"1"},
    "zip": {"a.zip": b"PK\x03\x04"},
    "gz": {"a.json.gz": b"\x1f\x8b"},
    "tar": {"a.tar": b"x"},
    "json": {"a.json": b"{"},
    "csv": {"a.csv": b"\xff\xfe\x00"},
    "parquet": {"a.parquet": b"PAR1"},
    "pdf": {"a.pdf": b"x"},
    "none": {},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_whatever_datasets_raises_about_a_folder_is_one_line(tmp_path: Path, kind: str) -> None:
    for name, data in FOLDERS[kind].items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CalibrationError, match=r"could not be read: .") as caught:
        load_text(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/", "//", "/:train", "//::train"])
def test_the_root_of_the_file_system_is_no_dataset(name: str) -> None:
    with pytest.raises(CalibrationError, match="root of the file system"):
        load_text(name)
