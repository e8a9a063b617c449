"""What others wrote comes in through one boundary: whatever is wrong with it, one error names it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crepe_deploy.errors import CheckpointError, ConfigError
from crepe_deploy.store.reading import (
    DEPTH,
    DIGITS,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_object,
    read_text,
    read_yaml,
)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\xff{}", "is not UTF-8: byte 0xff at offset 0"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'[{"b": {"a": 1, "a": 2}}]', "'a' is given twice"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b"9" * 5000, "a number of 5000 digits"),
        (b"[" * 101 + b"]" * 101, f"nested deeper than {DEPTH} levels"),
        (b'{"a":' * 200_000, f"nested deeper than {DEPTH} levels"),
        (b'{"a": ["\\ud800"]}', "is not JSON"),
        (b'{"\\uDfff": 1}', "is not JSON"),
    ],
)
def test_json_that_no_reader_should_take_is_refused(tmp_path: Path, document: bytes, reason: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(document)
    with pytest.raises(ConfigError, match=reason) as raised:
        read_json(path, ConfigError)
    assert "x.json" in str(raised.value) and len(str(raised.value)) < 500


def test_json_at_the_limits_is_read() -> None:
    assert parse_json(b"\xef\xbb\xbf[1]", "x") == [1]
    assert parse_json("[" * DEPTH + "]" * DEPTH, "x") is not None
    assert parse_json("1" * DIGITS, "x") == int("1" * DIGITS)
    assert parse_json('"\\ud83d\\ude00"', "x") == "😀"
    strange = parse_json('{"a": 1, "a": Infinity}', "x", lenient=True)
    assert strange == {"a": float("inf")}


@pytest.mark.parametrize("document", ["[]", "3", '"text"', "null"])
def test_an_object_is_asked_for(tmp_path: Path, document: str) -> None:
    (tmp_path / "x.json").write_text(document)
    with pytest.raises(CheckpointError, match="does not hold a JSON object"):
        read_object(tmp_path / "x.json")


def _merge_bomb(levels: int) -> str:
    lines = ["a0: &a0 {k0: 1}"]
    lines += [f"a{n}: &a{n} {{k{n}: 1, <<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


def _alias_bomb(levels: int) -> str:
    return "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels))])


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ("a: [", "is not YAML"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("1: x", "the name 1 is no text"),
        ("? [a]\n: x", "is no text"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 2026-13-45", "constructor"),
        ("a: 2026-01-02", "constructor"),
        ("a: !!binary YQ==", "constructor"),
        ("a: .inf", "the number .inf"),
        ("a: .nan", "the number .nan"),
        ("a: " + "9" * 5000, "a number of 5000 digits"),
        ("a: !!int x", "is not YAML"),
        ("[" * 2000, "nested deeper"),
        ("&a [*a]", "is not YAML|nested deeper"),
        ("a: &a {b: *a}", "is not YAML|nested deeper"),
        ('a: "\\ud800"', "is not YAML"),
        (_merge_bomb(9), "aliases make more than"),
        (_alias_bomb(9), "aliases make more than"),
    ],
)
def test_yaml_that_no_reader_should_take_is_refused(tmp_path: Path, document: str, reason: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(document)
    with pytest.raises(ConfigError, match=reason):
        read_yaml(path, ConfigError)


def test_yaml_with_aliases_and_merges_is_read() -> None:
    text = "base: &base {a: 1, b: [x, 2.5, true, null]}\nmore: {<<: *base, a: 2}\n"
    assert parse_yaml(text, "x") == {
        "base": {"a": 1, "b": ["x", 2.5, True, None]},
        "more": {"a": 2, "b": ["x", 2.5, True, None]},
    }
    assert parse_yaml("", "x") is None


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for path, reason in [
        (tmp_path / "fifo", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "none", "is missing"),
        (tmp_path / "loop", "cannot be read"),
        (tmp_path / ("n" * 300), "cannot be read"),
        (tmp_path / "a\0b", "cannot be read"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            read_bytes(path)


def test_a_file_is_read_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"abc")
    assert read_text(path, limit=3) == "abc"
    with pytest.raises(CheckpointError, match="has 3 bytes; at most 2 are read"):
        read_text(path, limit=2)
