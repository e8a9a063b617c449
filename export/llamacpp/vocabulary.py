"""A tokenizer as llama.cpp has it: byte-level BPE by the name of what splits words, or SentencePiece's BPE by scores.

Both are read from what `tokenizers` computes with, whatever file it came from. What llama.cpp would split, normalise or
merge differently is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ...errors import UnsupportedModel
from ...store.gguf import named
from ...store.reading import parse_json
from ...store.stock import tokenizer_of

Fields = dict[str, Any]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTES: Final = [f"<0x{number:02X}>" for number in range(256)]
_SPACE: Final = "▁"
_ENGLISH: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD: Final = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|\p{{N}}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What splits words, and whether whole words go before merges -> llama.cpp's name of both.
SPLITTERS: Final = {
    ("words of bytes",): {False: "gpt-2"},
    ("digits", "words of bytes"): {False: "smollm"},
    (rf"{_ENGLISH}|{_WORD}|\p{{N}}{{1,3}}{_REST}", "bytes"): {True: "llama-bpe", False: "smaug-bpe"},
    (rf"{_ENGLISH}|{_WORD}|\p{{N}}{_REST}", "bytes"): {False: "qwen2"},
    (_CASED % (f"{_ENGLISH}?", f"{_ENGLISH}?", "{1,3}"), "bytes"): {False: "gpt-4o"},
    (_CASED % ("", "", ""), "bytes"): {True: "tekken"},
}
# Those whose letters llama.cpp tells upper from lower case in ASCII alone.
CASED: Final = ("gpt-4o", "tekken")


def vocabulary_of(folder: Path, rows: int) -> tuple[Fields, tuple[str, ...]]:
    """The entries of `tokenizer.` in a GGUF file, and what llama.cpp does otherwise; rows: of the embedding.

    Raises NoTokenizer, UnsupportedModel naming what llama.cpp cannot hold, CheckpointError.
    """
    tokenizer = tokenizer_of(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModel(f"{folder}: its tokenizer ({type(tokenizer).__name__}) is none of the fast ones")
    spec: Any = parse_json(backend.to_str().encode(), f"{folder}: its tokenizer")
    model = spec["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise _refused(folder, f"a {model['type']} model" if model["type"] != "BPE" else "BPE with dropout or prefixes")
    if model.get("end_of_word_suffix"):
        raise _refused(folder, "BPE with an end of words")
    tokens, types, limits = _tokens(folder, spec, rows)
    if model.get("byte_fallback"):
        fields = _sentencepiece(folder, spec, tokens, types)
    else:
        fields = _byte_level(folder, spec)
        limits += _normaliser(folder, spec)
        if fields["tokenizer.ggml.pre"] in CASED:
            limits += ("llama.cpp splits words with letters beyond ASCII otherwise than the model's tokenizer",)
    fields |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    return {**fields, **_special(folder, tokenizer, rows), **_template(tokenizer)}, limits


def _refused(folder: Path, what: str) -> UnsupportedModel:
    return UnsupportedModel(f"{folder}: its tokenizer has {what}, which llama.cpp cannot be given")


def _tokens(folder: Path, spec: Mapping[str, Any], rows: int) -> tuple[list[str], list[int], tuple[str, ...]]:
    """A text and a type for every row of the embedding, and what is left out for want of one."""
    texts = {number: text for text, number in spec["model"]["vocab"].items()}
    types = dict.fromkeys(texts, NORMAL)
    for added in spec["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise _refused(folder, f"a token '{added['content']}' that takes the blanks or words around it")
        texts[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    beyond = [text for number, text in sorted(texts.items()) if number >= rows]
    left = (f"tokens without a row in the embedding are left out: {named(beyond)}",) if beyond else ()
    listed = [texts.get(number, f"[PAD{number}]") for number in range(rows)]
    if len(set(listed)) < rows or "" in listed:
        raise _refused(folder, "two tokens of one text, or one of none")
    return listed, [types.get(number, UNUSED) for number in range(rows)], left


def _byte_level(folder: Path, spec: Mapping[str, Any]) -> Fields:
    steps, whole_words = _steps(spec["pre_tokenizer"]), bool(spec["model"].get("ignore_merges"))
    name = SPLITTERS.get(steps, {}).get(whole_words) if steps else None
    if name is None:
        raise _refused(folder, f"a pre-tokenizer of its own ({json.dumps(spec['pre_tokenizer'])[:200]})")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _steps(given: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """What a pre-tokenizer does, step by step: a regular expression or one of the words in `SPLITTERS`; else None."""
    if given is None:
        return None
    steps: list[str] = []
    for step in given["pretokenizers"] if given["type"] == "Sequence" else [given]:
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            steps.append("words of bytes" if step["use_regex"] else "bytes")
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append(step["pattern"].get("Regex", ""))
        else:
            return None
    return tuple(steps)


def _normaliser(folder: Path, spec: Mapping[str, Any]) -> tuple[str, ...]:
    if spec["normalizer"] is None:
        return ()
    if spec["normalizer"]["type"] != "NFC":
        raise _refused(folder, f"a normaliser of type {spec['normalizer']['type']}")
    return ("llama.cpp does not compose Unicode characters (NFC) before it splits text, as the model's tokenizer does",)


def _sentencepiece(folder: Path, spec: Mapping[str, Any], tokens: Sequence[str], types: list[int]) -> Fields:
    """Scores that merge in the order of the merges; changes the types of bytes and of the unknown token."""
    model, prefix = spec["model"], _prefix(spec)
    missing = next((byte for byte in _BYTES if byte not in model["vocab"]), None)
    if prefix is None or missing or model.get("ignore_merges"):
        what = f"no token {missing}" if missing else "neither SentencePiece's blanks nor GPT-2's bytes"
        raise _refused(folder, what)
    for text in _BYTES:
        types[model["vocab"][text]] = BYTE
    if model["unk_token"] in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    ranks = _ranks(folder, model["merges"])
    lost = next((text for text, kind in zip(tokens, types, strict=True) if _unmade(text, kind, ranks)), None)
    if lost is not None:
        raise _refused(folder, f"a token '{lost}' that none of its merges makes")
    scores = [-float(ranks.get(text, 0)) for text in tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _ranks(folder: Path, merges: Sequence[Any]) -> dict[str, int]:
    """By text, its place among those that merges make; llama.cpp merges by what is made alone."""
    ranks: dict[str, int] = {}
    last = None
    for merge in merges:
        made = "".join(merge) if not isinstance(merge, str) else merge.replace(" ", "", 1)
        if made in ranks and made != last:
            raise _refused(folder, f"merges into '{made}' with others between them")
        last = made
        ranks.setdefault(made, len(ranks) + 1)
    return ranks


def _unmade(text: str, kind: int, ranks: Mapping[str, int]) -> bool:
    return kind == NORMAL and len(text) > 1 and text not in ranks


def _prefix(spec: Mapping[str, Any]) -> bool | None:
    """Whether a blank goes before the text, of the ways in which SentencePiece's blanks are spelled; else None."""
    given = spec["normalizer"]
    parts = [] if given is None else given["normalizers"] if given["type"] == "Sequence" else [given]
    splits = spec["pre_tokenizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if not parts and splits and splits["type"] == "Metaspace" and splits["replacement"] == _SPACE:
        return None if splits.get("split", True) else bool(splits["prepend_scheme"] != "never")
    idle = splits is None or (splits["type"] == "Split" and splits["pattern"] == {"String": " "})
    if idle and parts == [{"type": "Prepend", "prepend": _SPACE}, replace]:
        return True
    return False if idle and parts == [replace] else None


def _special(folder: Path, tokenizer: Any, rows: int) -> Fields:
    """The ids of special tokens, and which are put around a text."""
    with_them, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    for bos, eos in ((False, False), (True, False), (False, True), (True, True)):
        if with_them == [first] * bos + bare + [last] * eos:
            break
    else:
        raise _refused(folder, f"special tokens around a text ({with_them}) that are neither BOS nor EOS")
    ids = {"bos": first, "eos": last, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    held = {name: number for name, number in ids.items() if number is not None and number < rows}
    return {
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in held.items()},
        "tokenizer.ggml.add_bos_token": bos,
        "tokenizer.ggml.add_eos_token": eos,
    }


def _template(tokenizer: Any) -> Fields:
    """The chat template; of several the default one, beside the others by name."""
    given = tokenizer.chat_template
    if isinstance(given, str):
        return {"tokenizer.chat_template": given}
    named = dict(given or {})
    others = {name: text for name, text in named.items() if name != "default"}
    return {
        **({"tokenizer.chat_template": named["default"]} if "default" in named else {}),
        **({"tokenizer.chat_templates": list(others)} if others else {}),
        **{f"tokenizer.chat_template.{name}": text for name, text in others.items()},
    }
