"""Text sources and calibration windows."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_deploy import texts
from crepe_deploy.documents import load_documents, load_text, parse_dataset_name
from crepe_deploy.errors import CalibrationError, CheckpointError, ConfigError, MissingExtra
from crepe_deploy.texts import (
    calibration_windows,
    draw_windows,
    load_tokenizer,
    tokenize,
)
from tests.pico import make_pico_llama, pico_tokenizer, sample_text


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], Path]:
    def write_file(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write_file


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n ", "holds no text"),
        ("a.txt", b"caf\xe9 au lait", "not UTF-8: byte 0xe9 at offset 3"),
        ("a.jsonl", b'{"text": "x"}\n\xff', "line 2 is not UTF-8: byte 0xff at offset 0"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"', "line 3 is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', "line 2 has no text in field 'text': its fields are body"),
        ("a.jsonl", b'{"text": 3}', "line 1 has no text"),
        ("a.jsonl", b'"text"', "line 1 has no text in field 'text': it is no object"),
        ("a.parquet", b"PAR1 but not really", "not a parquet file"),
        ("a.csv", b"text", "kinds that can be read: .txt, .jsonl, .parquet"),
    ],
)
def test_bad_files_are_named_with_the_place(
    write: Callable[[str, bytes], Path], name: str, data: bytes, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_text(write(name, data))


def test_missing_file_and_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.txt is missing"):
        load_text(tmp_path / "nowhere.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(CalibrationError, match="not a regular file"):
        load_text(tmp_path / "folder.txt")


def test_parquet_without_the_column_or_with_a_null(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one", None]}), path)
    with pytest.raises(CalibrationError, match="no column 'text': its columns are body"):
        load_text(path)
    with pytest.raises(CalibrationError, match="row 1 has no text in field 'body'"):
        load_text(path, field="body")


def test_too_little_text_says_how_much_is_missing(write: Callable[[str, bytes], Path]) -> None:
    path = write("a.txt", b"the first city")
    have = tokenize(pico_tokenizer(), "the first city").numel()
    with pytest.raises(CalibrationError, match=f"has {have} tokens and 64 are needed: {64 - have} are missing"):
        calibration_windows(path, pico_tokenizer(), samples=4, length=16)


@pytest.mark.parametrize(("samples", "length"), [(0, 16), (4, 1), (-1, 16)])
def test_nonsense_sizes_are_refused(write: Callable[[str, bytes], Path], samples: int, length: int) -> None:
    with pytest.raises(ConfigError):
        calibration_windows(write("a.txt", b"text"), pico_tokenizer(), samples, length)


@pytest.mark.parametrize("source", ["owner/no-such-dataset", "no-such-dataset:config:train"])
def test_a_dataset_that_cannot_be_reached_is_one_clear_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("offline\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(CalibrationError, match=r"is no file on this disk, .* could not be read: offline more$"):
        load_text(source)


def test_a_folder_without_the_split_says_that_it_is_one_and_what_to_name(write: Callable[[str, bytes], Path]) -> None:
    folder = write("train.txt", b"the first city").parent
    with pytest.raises(CalibrationError) as refused:
        load_text(folder, split="test")
    said = f"'{folder}' is a folder, in which split test of a dataset was looked for: name a file in it (.txt, "
    assert str(refused.value).startswith(said) and f" or '{folder}::SPLIT'; it could " in str(refused.value)
    assert load_text(f"{folder}::train").documents == ["the first city"]


@pytest.mark.parametrize(("package", "source"), [("datasets", "some/set"), ("pyarrow", "a.parquet")])
def test_missing_package_names_the_extra(
    write: Callable[[str, bytes], Path], monkeypatch: pytest.MonkeyPatch, package: str, source: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(MissingExtra, match=rf"{package}.*crepe-deploy\[eval\]"):
        load_text(write(source, b"x") if source.endswith(".parquet") else source)


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="not a model folder"):
        load_tokenizer(tmp_path / "none")


def test_every_kind_gives_the_same_documents(write: Callable[[str, bytes], Path], tmp_path: Path) -> None:
    documents = ["the first city", "Größe\nand 日本"]
    jsonl = write("a.jsonl", "\n".join(json.dumps({"body": text}) for text in documents).encode())
    parquet = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": documents}), parquet)
    assert load_documents(jsonl, "body") == load_documents(parquet, "body") == documents
    plain = write("a.txt", b"\xef\xbb\xbfthe first city")
    text = load_text(plain)
    assert text.documents == ["the first city"]
    assert text.sha256 == hashlib.sha256(plain.read_bytes()).hexdigest()


def test_a_dataset_folder_is_streamed_and_cut(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"document {index}"} for index in range(10)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole = load_text(f"{folder}::train")
    assert whole.documents == [row["text"] for row in rows]
    assert not whole.truncated
    assert whole.sha256 == hashlib.sha256(whole.joined.encode()).hexdigest()
    cut = load_text(f"{folder}:train", max_chars=25)
    assert cut.documents == whole.documents[:3]
    assert cut.truncated
    with pytest.raises(CalibrationError, match="split nosuch"):
        load_text(f"{folder}::nosuch")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", None, "test")),
        ("name:validation", ("name", None, "validation")),
        ("name:en", ("name", "en", "test")),
        ("name:en:train[:10]", None),
        ("name:en:train", ("name", "en", "train")),
        ("name::train", ("name", None, "train")),
        (":x", None),
    ],
)
def test_dataset_names(source: str, expected: tuple[str, str | None, str] | None) -> None:
    if expected is None:
        with pytest.raises(CalibrationError, match="no dataset name"):
            parse_dataset_name(source, "test")
    else:
        assert parse_dataset_name(source, "test") == expected


@settings(max_examples=60, deadline=None)
@given(samples=st.integers(1, 8), length=st.integers(1, 9), spare=st.integers(0, 20), seed=st.integers(0, 2**31))
def test_windows_are_contiguous_in_range_and_never_overlap(samples: int, length: int, spare: int, seed: int) -> None:
    ids = torch.arange(samples * length + spare)
    windows = draw_windows(ids, samples, length, seed)
    assert windows.shape == (samples, length)
    assert torch.equal(windows, windows[:, :1] + torch.arange(length))
    assert windows.unique().numel() == windows.numel()


def test_windows_follow_the_seed_alone_and_leave_global_randomness(write: Callable[[str, bytes], Path]) -> None:
    path = write("a.txt", sample_text(3000).encode())
    before = torch.random.get_rng_state()
    first = calibration_windows(path, pico_tokenizer(), samples=8, length=32, seed=3)
    torch.manual_seed(99)
    again = calibration_windows(path, pico_tokenizer(), samples=8, length=32, seed=3)
    other = calibration_windows(path, pico_tokenizer(), samples=8, length=32, seed=4)
    torch.random.set_rng_state(before)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.tokens.dtype == torch.int64
    text = path.read_text()
    assert all(pico_tokenizer().decode(row) in text for row in first.tokens)


def test_the_record_says_what_was_drawn(write: Callable[[str, bytes], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MIN_CHARS", 1)
    path = write("a.txt", sample_text(3000).encode())
    record = calibration_windows(path, pico_tokenizer(), samples=4, length=32).record()
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (record["samples"], record["length"], record["token_count"], record["seed"]) == (4, 32, 128, 0)
    assert record["rule"].startswith("the first 2048 characters")
    assert json.loads(json.dumps(record)) == record


def test_several_sources_give_equal_shares_in_one_random_order(write: Callable[[str, bytes], Path]) -> None:
    tokenizer = pico_tokenizer()
    names = [str(write(f"{index}.txt", sample_text(400, seed=index).encode())) for index in range(3)]
    shares_of = (3, 3, 2)
    mixed = calibration_windows(names, tokenizer, 8, 16, seed=4)
    shares = [
        calibration_windows(name, tokenizer, count, 16, seed=4) for name, count in zip(names, shares_of, strict=True)
    ]
    apart = torch.cat([share.tokens for share in shares])
    assert sorted(mixed.tokens.tolist()) == sorted(apart.tolist()) and not torch.equal(mixed.tokens, apart)
    record = mixed.record()
    assert (
        record["source"] == " + ".join(names) and record["samples"] == 8 and record["rule"].startswith("equal shares")
    )
    assert [(part["source"], part["samples"]) for part in record["parts"]] == list(zip(names, shares_of, strict=True))
    assert [part["sha256"] for part in record["parts"]] == [share.sha256 for share in shares]
    assert record["sha256"] != calibration_windows(names[::-1], tokenizer, 8, 16, seed=4).sha256
    one = calibration_windows(names[:1], tokenizer, 8, 16, seed=4)
    assert one.record() == calibration_windows(names[0], tokenizer, 8, 16, seed=4).record() and not one.parts


@pytest.mark.parametrize(
    ("picked", "samples", "message"),
    [((), 4, "each once: none"), ((0, 0), 4, "each once"), ((0, 1), 1, "cannot come from 2 sources")],
)
def test_mixtures_that_make_no_sense_are_refused(
    write: Callable[[str, bytes], Path], picked: tuple[int, ...], samples: int, message: str
) -> None:
    paths = [write(f"{index}.txt", sample_text(100, seed=index).encode()) for index in range(2)]
    with pytest.raises(ConfigError, match=message):
        calibration_windows([paths[index] for index in picked], pico_tokenizer(), samples, 8)


def test_text_that_needs_more_characters_than_the_cut_is_read_whole(
    write: Callable[[str, bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "CHARS_PER_TOKEN", 1)
    monkeypatch.setattr(texts, "MIN_CHARS", 1)
    path = write("a.txt", sample_text(3000).encode())
    assert calibration_windows(path, pico_tokenizer(), 4, 32).rule.startswith("the text")


@pytest.mark.parametrize("nested", [False, True])
def test_gemma_windows_start_with_bos(write: Callable[[str, bytes], Path], tmp_path: Path, nested: bool) -> None:
    """By model type, whatever the tokenizer's class: a plain PreTrainedTokenizerFast here."""
    pico_tokenizer().save_pretrained(tmp_path / "m")
    config = {"model_type": "gemma3_text"}
    (tmp_path / "m" / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    tokenizer = load_tokenizer(tmp_path / "m")
    assert "Gemma" not in type(tokenizer).__name__
    drawn = calibration_windows(write("a.txt", sample_text(3000).encode()), tokenizer, 4, 32)
    assert drawn.tokens.shape == (4, 32)
    assert (drawn.tokens[:, 0] == pico_tokenizer().bos_token_id).all()
    assert not (drawn.tokens[:, 1:] == pico_tokenizer().bos_token_id).any()
    assert drawn.bos == "window"


def test_load_tokenizer_reads_a_folder(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_pico_llama(tmp_path / "pico"))
    assert tokenize(tokenizer, "the city").tolist() == pico_tokenizer()("the city").input_ids
