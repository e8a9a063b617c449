"""Tokens for calibration and evaluation alike, from the documents of a source: whole texts, prefixes, windows, BOS."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .device import CPU
from .documents import Text, load_text
from .errors import CalibrationError, CheckpointError, ConfigError
from .limits import MOST, check_seed
from .model.families import family_of
from .progress import Say, Show, hidden, unsaid
from .selftext import SELF, own_text
from .store.checkpoint import read_config
from .store.stock import tokenizer_of

CHARS_PER_TOKEN = 16
MIN_CHARS = 2_000_000
WHOLE_CHARS = 50_000_000  # a text of no more than these is read whole where its beginning has too few tokens
SLACK = 256  # tokens behind those that are wanted, which the end of a cut text may change


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
    say: Say = unsaid,
    show: Show = hidden,
    device: torch.device = CPU,
) -> CalibrationSet:
    """Draw `samples` windows of `length` tokens from a source, at random without overlap, by a generator of its own.

    Documents are joined by blank lines and tokenised without special tokens, though each window starts with BOS where
    the family needs it. A text far longer than wanted is first cut to CHARS_PER_TOKEN characters a token, or MIN_CHARS.
    Of several sources each gives as many windows as the others (the first ones one more where that does not come out
    even), in one random order. The source "self" is the model beside the tokenizer, which writes them (`own_text`,
    which is told `say` and shown by `show`) on this device.
    Raises CalibrationError saying how many tokens are missing, ConfigError, and as `load_text` does.
    """
    check_seed(seed)
    if samples < 1 or length < 2 or samples * length > MOST:
        raise ConfigError(
            f"{samples} calibration samples of {length} tokens: it must be 1 of 2, and {MOST} tokens at most"
        )
    if isinstance(source, (str, Path, Text)):
        return _windows(source, tokenizer, samples, length, seed, field, say, show, device)
    names = [str(one) for one in source]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"calibration sources must be given, and each once: {', '.join(names) or 'none is'}")
    if len(names) == 1:
        return _windows(names[0], tokenizer, samples, length, seed, field, say, show, device)
    if samples < len(names):
        raise ConfigError(f"{samples} calibration samples cannot come from {len(names)} sources: raise the samples")
    share, more = divmod(samples, len(names))
    counts = {name: share + (index < more) for index, name in enumerate(names)}
    drawn = {
        name: _windows(name, tokenizer, counts[name], length, seed, field, say, show, device)
        for name in sorted(names, key=SELF.__eq__)  # what is written after what is read, which may be refused
    }
    return _mixed([drawn[name] for name in names])


def _mixed(sets: list[CalibrationSet]) -> CalibrationSet:
    order = torch.randperm(
        sum(len(part.tokens) for part in sets), generator=torch.Generator().manual_seed(sets[0].seed)
    )
    kept = ("source", "sha256", "samples", "text_tokens")
    rules = dict.fromkeys(part.rule for part in sets)
    return replace(
        sets[0],
        tokens=torch.cat([part.tokens for part in sets])[order],
        source=" + ".join(part.source for part in sets),
        sha256=hashlib.sha256("".join(part.sha256 for part in sets).encode()).hexdigest(),
        text_tokens=sum(part.text_tokens for part in sets),
        rule=f"equal shares in random order; each: {'; or: '.join(rules)}",
        parts=tuple({name: part.record()[name] for name in kept} for part in sets),
    )


def _windows(
    source: str | Path | Text, tokenizer: Any, samples: int, length: int, seed: int, field: str, say: Say, show: Show,
    device: torch.device,
) -> CalibrationSet:  # fmt: skip
    bos = wants_bos_each_window(tokenizer)
    if source == SELF:
        folder = Path(tokenizer.name_or_path)
        own = own_text(folder, tokenizer, samples, length, seed, bos=bos, say=say, show=show, device=device)
        said = "window" if bos else "none"
        return CalibrationSet(own.tokens, SELF, own.sha256, "", seed, own.tokens.numel(), own.rule, said)
    body = length - 1 if bos else length
    ids, text, rule = _enough_tokens(tokenizer, source, samples * body, field)
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


def _enough_tokens(
    tokenizer: Any, source: str | Path | Text, wanted: int, field: str
) -> tuple[Tensor, Text, str]:  # fmt: skip
    """The tokens of as much of a text as holds `wanted` ones, that text, and what was used of it, in words."""
    cut = max(MIN_CHARS, CHARS_PER_TOKEN * wanted)
    while True:
        text = source if isinstance(source, Text) else load_text(source, field, max_chars=cut, file_chars=cut + 1)
        whole = text.joined
        ids = tokenize(tokenizer, whole[:cut])
        all_used = len(whole) <= cut and not text.truncated
        if ids.numel() >= wanted or len(whole) <= cut:
            break
        cut = max(8 * cut, WHOLE_CHARS)
    used = "the text" if all_used else f"the first {cut} characters"
    if ids.numel() < wanted:
        raise CalibrationError(
            f"{text.source} has {ids.numel()} tokens and {wanted} are needed: {wanted - ids.numel()} are missing; "
            f"give more text, fewer samples or shorter ones"
        )
    return ids, text, f"{used}, documents joined by blank lines, windows at random places without overlap"


def first_tokens(
    tokenizer: Any, source: str | Path, field: str, wanted: int | None
) -> tuple[Tensor, Text, int | None]:  # fmt: skip
    """The first `wanted` tokens of a text as they stand in the whole (None: all), what was read, and its tokens in all.

    Only as much of a long text is tokenised as that takes: then nobody knows how many it has in all, and it is None.
    Raises as `load_text` does.
    """
    cut = None if wanted is None else max(MIN_CHARS, 8 * (wanted + SLACK))
    while True:
        text = load_text(source, field, split="test", file_chars=None if cut is None else cut + 1)
        whole = text.joined
        ids = tokenize(tokenizer, whole[:cut])
        if wanted is None or cut is None or len(whole) <= cut:
            return ids[:wanted], text, ids.numel()
        if ids.numel() >= wanted + SLACK:
            return ids[:wanted], text, None
        cut *= 8
