"""`--calib self`: calibration text that the dense model writes itself, so that no file and no network are needed.

Windows are sampled at temperature 1 from the whole distribution, each from one of the model's own starts in turn: its
BOS, and where it has a chat template what that puts in front of an answer, so that chat and reasoning models write what
they would answer. Without either they start with one of PROMPTS. After its end-of-text token a window starts anew. The
starts are part of the windows, for the model reads them too. The whole model is in memory meanwhile. What was written
is kept in the cache by the sha256 of everything that decides it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from .device import CPU, described
from .errors import CheckpointError, CrepeError, NumericalError, UnsupportedModel
from .machine import cache_dir
from .model.architecture import load_config, whole_model
from .progress import Progress, Say, Show, hidden, silent
from .store.checkpoint import shard_paths
from .store.files import to_json, write_json
from .store.manifest import sha256_file
from .store.reading import read_object
from .store.stock import check_ids, third_party

SELF: Final = "self"
PROMPTS: Final = ("The", "In", "I", "A", "How", "What", "We", "def", "1.", "#")
TEMPERATURE: Final = 1.0
BATCH: Final = 64  # windows at a time; another number rounds differently and writes other text
_FORMAT: Final = 1
_MARK: Final = "crepe-deploy"


@dataclass(frozen=True)
class OwnText:
    """Windows (samples, length) int64 that a model wrote, the sha256 of their ids, and how, in words."""

    tokens: Tensor
    sha256: str
    rule: str


def own_text(
    folder: Path, tokenizer: Any, samples: int, length: int, seed: int, *, bos: bool, say: Say, show: Show = hidden,
    device: torch.device = CPU,
) -> OwnText:  # fmt: skip
    """Windows that the model in `folder` wrote, from the cache where it has written them before.

    bos: whether every window has to start with BOS. say: told before anything is sampled, which `show` wraps. device:
    that the model writes on, whose rounding is part of what decides the text. Raises CheckpointError, UnsupportedModel,
    NumericalError, DiskFullError, OutputError.
    """
    starts, words = starts_of(tokenizer, bos=bos)
    starts = [start[:length] for start in starts]
    ends = sorted({token for token in (tokenizer.eos_token_id, *_end_ids(folder)) if token is not None})
    rows = int(load_config(folder).get_text_config().vocab_size)
    check_ids(tokenizer, [token for start in starts for token in start], rows)
    asked: dict[str, Any] = {"starts": starts, "ends": ends, "samples": samples, "length": length, "seed": seed}
    path = _path(folder, asked if device.type == CPU.type else {**asked, "device": described(device)})
    tokens = _kept(path, samples, length, rows)
    if tokens is None:
        say(f"the model writes {samples} windows of {length} tokens of its own (once; kept in {path})")
        model = whole_model(folder, dtype="auto").to(device)
        with show("writing calibration text") as step:
            tokens = sample(model, starts, ends, samples, length, seed, step)
        write_json(path, {"tokens": [" ".join(map(str, row)) for row in tokens.tolist()]})
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    rule = f"written by the model itself, temperature {TEMPERATURE:g}, each window from {words}, anew after end of text"
    return OwnText(tokens, digest, rule)


def sampling_bytes(config: Any, weights: int, itemsize: int, samples: int, length: int) -> int:
    """Memory that writing takes at most: `weights`, keys and values of a batch, probabilities.

    config: transformers'. itemsize: bytes of a number of the model's dtype.
    """
    text, rows = config.get_text_config(), min(samples, BATCH)
    heads, size = getattr(text, "num_key_value_heads", None), getattr(text, "head_dim", None)
    width = int(text.hidden_size)  # what is not known is at most the whole
    if isinstance(heads, int) and isinstance(size, int):
        width = heads * size
    cached = 2 * int(text.num_hidden_layers) * width * itemsize * (length + 1)
    return weights + rows * (cached + int(text.vocab_size) * (itemsize + 3 * 8))


def starts_of(tokenizer: Any, *, bos: bool) -> tuple[list[list[int]], str]:
    """What windows start with, in turn, as token ids, and the same in words. Raises CheckpointError."""
    first = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    starts, words = ([first], "BOS") if first else ([], "")
    if answer := _answer_start(tokenizer):
        starts.append(first + answer if bos and answer[:1] != first else answer)
        words = f"{words} or the chat template's start of an answer in turn" if words else "the start of an answer"
    if not starts:
        starts = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
        words = f"one of {len(PROMPTS)} prompts ({', '.join(PROMPTS)})"
    return [list(map(int, start)) for start in starts], words


def _answer_start(tokenizer: Any) -> list[int]:
    """The tokens that a chat template puts in front of an answer; none without a template, or where it puts none."""
    if not tokenizer.chat_template:
        return []
    try:
        with third_party(f"{tokenizer.name_or_path}: its chat template fails", CheckpointError):
            asked = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=answering
                )
                for answering in (False, True)
            ]
    except CrepeError:
        return []  # one that only knows other kinds of messages
    added = asked[1].removeprefix(asked[0]) if asked[1].startswith(asked[0]) else ""
    return list(tokenizer(added, add_special_tokens=False)["input_ids"]) if added else []


def _end_ids(folder: Path) -> list[int]:
    """End-of-text tokens of `generation_config.json`, where there is one."""
    path = folder / "generation_config.json"
    named = read_object(path, lenient=True).get("eos_token_id") if path.exists() else None
    return [token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)]


def _path(folder: Path, asked: dict[str, Any]) -> Path:
    files = {path.name: sha256_file(path) for path in (folder / "config.json", *shard_paths(folder))}
    decided = {"format": _FORMAT, "files": files, "temperature": TEMPERATURE, "batch": BATCH, **asked}
    return cache_dir() / SELF / f"{hashlib.sha256(to_json(decided).encode()).hexdigest()}.json"


def _kept(path: Path, samples: int, length: int, rows: int) -> Tensor | None:
    """Windows from the cache; None where there are none, or a damaged file, which is written anew."""
    if not path.exists():
        return None
    try:
        tokens = torch.tensor([list(map(int, row.split())) for row in read_object(path)["tokens"]])
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        return None
    fits = tokens.shape == (samples, length) and tokens.dtype == torch.long
    return tokens if fits and int(tokens.min()) >= 0 and int(tokens.max()) < rows else None


@torch.inference_mode()
def sample(
    model: Any, starts: list[list[int]], ends: list[int], samples: int, length: int, seed: int, step: Progress = silent
) -> Tensor:
    """Windows (samples, length) int64, window i from `starts[i % len(starts)]`; deterministic by `seed`.

    The same draws for each window, whatever its neighbours do. step: told the tokens written and wanted.
    Raises NumericalError, and UnsupportedModel for a model that keeps no cache of what it has read.
    """
    draws = torch.rand(samples, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = torch.empty(samples, length, dtype=torch.long)
    for begin in range(0, samples, BATCH):
        rows = range(begin, min(begin + BATCH, samples))
        cache: Any = None
        ahead = [list(starts[row % len(starts)]) for row in rows]
        chosen = [0] * len(rows)
        for position in range(length):
            read = []
            for queue, row, token in zip(ahead, rows, chosen, strict=True):
                if token in ends and not queue:
                    queue += [token, *starts[row % len(starts)]]
                read.append(queue.pop(0) if queue else token)
            whole[begin : rows.stop, position] = torch.tensor(read)
            tokens = torch.tensor(read).unsqueeze(1).to(model.device)
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise UnsupportedModel(f"model type '{model.config.model_type}' keeps no cache: give --calib FILE")
            chosen = _drawn(output.logits[:, -1], draws[begin : rows.stop, position]).tolist()
            step(begin * length + (position + 1) * len(rows), samples * length)
    return whole


def _drawn(logits: Tensor, draws: Tensor) -> Tensor:
    """The tokens (n,) at the quantiles `draws` (n,) of softmax(logits / TEMPERATURE), logits (n, vocabulary)."""
    if not logits.isfinite().all():
        raise NumericalError("the model's logits are not finite while it writes text of its own: give --calib FILE")
    summed = torch.softmax(logits.float() / TEMPERATURE, dim=-1).double().cumsum(-1)
    picked = torch.searchsorted(summed, draws.to(summed.device).unsqueeze(1) * summed[:, -1:], right=True)
    return picked.squeeze(1).clamp_max(logits.shape[-1] - 1)
