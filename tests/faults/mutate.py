"""Spoiling a document by chance: JSON by its structure or its spelling, bytes, lines. One seed, one result."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

from tests.mutations import SPOILT, Place, places

TEXTS = (
    "", " ", "x" * 300, "../../x", "/etc/passwd", "a/b", ".", "..", "~", "\x00", "a\x00b", "\n", "\t|`<b>*", "\ud800",
    "\u202e\U0001f600\u0301", "-1", "0", "1e999", "nan", "None", "true", "*", "[", "(a+)+$", "\\", "{}",
    "%s%n", "$HOME",
    "float64", "F8_E4M3", "U8", "auto", "llama", "LlamaForCausalLM", "2:4", "0:4", "33:64", "1", "<s>", "cuda",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 31, 32, 33, 255, 256, 319, 320, 321, 511, 65535, 65536, 50_000, 2**31 - 1, 2**31, 2**32, 2**53,
    2**63 - 1, 2**63, 2**64, 10**30, -(2**31), -(2**63), 0.0, -0.0, 0.5, 1e-9, 1e-45, 1e9, 1e30, 1e308, -1e308, 1e-320,
    True, False,
)  # fmt: skip
CONSTANTS = (float("nan"), float("inf"), float("-inf"))


def spoil_json(document: Any, rng: Random, constants: bool = False) -> Any:
    """A copy of a JSON document with one to three places changed, dropped, moved or added to."""
    changed = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(changed))
        if not found or rng.random() < 0.01:
            return copy.deepcopy(rng.choice(SPOILT))
        _change(changed, rng.choice(found), found, rng, constants)
    return changed


def _change(document: Any, place: Place, found: list[Place], rng: Random, constants: bool) -> None:
    """Change one place of a document."""
    parent = _at(document, place[:-1])
    value = parent[place[-1]]
    what = rng.random()
    if what < 0.12:
        del parent[place[-1]]
    elif what < 0.2:
        parent[place[-1]] = copy.deepcopy(_at(document, rng.choice(found)))
    elif what < 0.26 and isinstance(parent, dict):
        parent[rng.choice((*TEXTS, str(place[-1]) + "x", str(place[-1]).upper()))] = parent.pop(place[-1])
    elif what < 0.3 and isinstance(parent, dict):
        parent[rng.choice(TEXTS)] = copy.deepcopy(rng.choice(SPOILT))
    elif what < 0.34 and isinstance(parent, list):
        parent.extend([copy.deepcopy(value)] * rng.choice((1, 2, 100)))
    elif what < 0.6:
        parent[place[-1]] = copy.deepcopy(rng.choice(SPOILT))
    elif constants and what < 0.66:
        parent[place[-1]] = rng.choice(CONSTANTS)
    else:
        parent[place[-1]] = _like(value, rng)


def _like(value: Any, rng: Random) -> Any:
    """Another value, mostly of the same type."""
    if isinstance(value, bool):
        return rng.choice((not value, int(value), str(value).lower()))
    if isinstance(value, int | float):
        near = (value + 1, value - 1, -value, value * 2, value * 1000, str(value), float(value), [value])
        return rng.choice((*NUMBERS, *near))
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        near = (value[:cut], value[cut:], value * 2, value.upper(), value + "\n", value[::-1], [value], {value: value})
        return rng.choice((*TEXTS, *near))
    if isinstance(value, list):
        shuffled = rng.sample(value, len(value))
        return rng.choice((shuffled, value[:1], value[1:], value * 2, [value], {}, dict(enumerate(map(str, value)))))
    if isinstance(value, dict):
        return rng.choice(({}, [value], list(value), list(value.values()), dict.fromkeys(value)))
    return rng.choice((*NUMBERS, *TEXTS, [], {}))


def _at(document: Any, place: Place) -> Any:
    for name in place:
        document = document[name]
    return document


def spell(document: Any) -> bytes:
    """A document as bytes of JSON, surrogates escaped."""
    return json.dumps(document, indent=1 if len(str(document)) < 10_000 else None).encode()


def misspell(data: bytes, rng: Random) -> bytes:
    """Bytes of JSON that no writer of JSON would write."""
    text = data.decode("utf-8", "replace")
    where = rng.randrange(len(text) + 1)
    number = "1" * rng.choice((101, 5000, 100_000))
    depth = rng.choice((99, 101, 1000, 100_000))
    what = rng.randrange(14)
    if what == 0:
        return data[: rng.randrange(len(data) + 1)]
    if what == 1:
        return data + rng.choice((b"}", b"\x00", b"{}", b"\xff", data))
    if what == 2:
        return text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-be")), "replace")
    if what == 3:
        return rng.choice((b"", b"\n", b"null", b"[]", b"{}", b"\xff\xfe", b"0", b'""', b"\x00" * 64))
    if what == 4:
        return (b"[" * depth) + rng.choice((b"", b"]" * depth))
    if what == 5:
        return (b'{"a":' * depth) + b"1" + b"}" * depth
    inside = {
        6: f'"x": {number},', 7: "NaN", 8: "Infinity", 9: '"\\ud800"', 10: "//", 11: "\x00",
        12: f"-{number}e{number[:9]}",
    }  # fmt: skip
    if what in inside:
        return (text[:where] + inside[what] + text[where:]).encode("utf-8", "replace")
    for value in rng.sample(("0", "1", "true", "null", '"', ":"), 6):  # a value that is there, said otherwise
        if value in text:
            other = rng.choice((number, f"{number}.5", "NaN", "-Infinity", "1e999", "[" * depth, '"\\ud800"', "{}"))
            return text.replace(value, other, rng.choice((1, -1)) if len(text) < 10_000 else 1).encode(
                "utf-8", "replace"
            )
    return data


def spoil_bytes(data: bytes, rng: Random, reach: int | None = None) -> bytes:
    """Bytes with some flipped, cut, doubled, moved or overwritten, within the first `reach`."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not changed:
            return bytes(changed)
        top = min(len(changed), reach or len(changed))
        start = rng.randrange(top)
        what = rng.randrange(8)
        if what == 0:
            changed[start] ^= 1 << rng.randrange(8)
        elif what == 1:
            changed[start] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif what == 2:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice((0, 1, 2, 0x7F, 0xFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1, len(data)))
            changed[start : start + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
        elif what == 3:
            del changed[start : start + rng.choice((1, 4, 8, 64, 4096))]
        elif what == 4:
            piece = changed[start : start + rng.choice((1, 4, 8, 64))]
            changed[start:start] = piece * rng.choice((1, 2, 100))
        elif what == 5:
            del changed[start:]
        elif what == 6:
            changed[start : start + rng.choice((4, 64))] = rng.randbytes(rng.choice((4, 64)))
        else:
            changed[start:start] = rng.choice((b"\x00", b"\n", b"\xff\xff", b"\xed\xa0\x80", b"'", b'"', b"{", b"- "))
    return bytes(changed)


def spoil_text(data: bytes, rng: Random) -> bytes:
    """Lines dropped, doubled, swapped, cut; or their bytes spoilt."""
    lines = data.splitlines(keepends=True)
    what = rng.randrange(7)
    if what == 0 or len(lines) < 2:
        return spoil_bytes(data, rng)
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    if what == 1:
        del lines[one]
    elif what == 2:
        lines[one:one] = [lines[other]] * rng.choice((1, 2, 50))
    elif what == 3:
        lines[one], lines[other] = lines[other], lines[one]
    elif what == 4:
        lines[one] = lines[one][: rng.randrange(len(lines[one]) + 1)]
    elif what == 5:
        del lines[one:]
    else:
        lines[one] = spoil_bytes(lines[one], rng)
    return b"".join(lines)
