"""Quality of a model folder on a text: perplexity, alone or paired with a reference (KL, same top token).

Folders are loaded by stock transformers, never with remote code. The maths is in `scoring`, the text in `texts`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crepe_deploy.device import CPU
from crepe_deploy.documents import Text
from crepe_deploy.errors import CheckpointError, ConfigError, NumericalError, UnsupportedModel
from crepe_deploy.limits import check_seed
from crepe_deploy.machine import peak_rss_bytes
from crepe_deploy.model.architecture import whole_model
from crepe_deploy.model.decoder import COMPUTE_DTYPES
from crepe_deploy.nearest import unknown
from crepe_deploy.progress import Progress, Say, part, silent, unsaid
from crepe_deploy.store.stock import check_ids, config_of, third_party
from crepe_deploy.texts import first_tokens, load_tokenizer, tokenize, wants_bos_each_window

from .scoring import (
    LEVEL,
    RESAMPLES,
    Estimate,
    estimate,
    exp_mean,
    kl_per_token,
    mean,
    p99,
    same_top_token,
    token_nll,
    window_spans,
)

BOS_MODES = ("auto", "none", "start", "window")
FEW_WINDOWS = 8  # below, a bootstrap over windows says little
LOGIT_ROWS = 16  # few enough to stay in a CPU cache as float32: twice as fast as 256


@dataclass(frozen=True)
class Convention:
    """Everything that a perplexity depends on besides the model.

    text_tokens: in the whole text, None where it was not read that far. tokens: of the text in the windows, an
    incomplete last one left out. predicted: tokens scored. window: after clipping to the model's context.
    bos: "none"; "start": one BOS in front of the text; "window": one in front of every window, within its length.
    """

    text: str
    sha256: str
    text_tokens: int | None
    max_tokens: int | None
    tokens: int
    windows: int
    window: int
    stride: int
    predicted: int
    bos: str
    dtype: str
    device: str


@dataclass(frozen=True)
class Paired:
    """A model beside a reference on the same tokens. KL is KL(reference || model) in nats, by predicted token.

    same_top: share of predicted tokens where both rank the same token first.
    """

    reference: str
    reference_dtype: str
    reference_perplexity: Estimate
    perplexity_ratio: Estimate
    kl_mean: Estimate
    kl_p99: Estimate
    same_top: Estimate


@dataclass(frozen=True)
class QualityReport:
    """What `evaluate` measured; `to_dict` is JSON-ready."""

    model: str
    perplexity: Estimate
    paired: Paired | None
    convention: Convention
    bootstrap: dict[str, float]
    seconds: float
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, numbers and strings."""
        return asdict(self)


@dataclass(frozen=True)
class Windows:
    """Token sequences as the model reads them, each int64 (window,), and where scoring starts in each.

    tokens: distinct tokens of the text that they cover, a BOS at its start included.
    """

    sequences: list[Tensor]
    first_scored: list[int]
    stride: int
    tokens: int

    @property
    def predicted(self) -> int:
        """Tokens scored in all windows."""
        return sum(len(ids) - first for ids, first in zip(self.sequences, self.first_scored, strict=True))


@dataclass(frozen=True)
class _Scores:
    """Float32 (predicted,) each, on the CPU; without a reference the model stands for it."""

    nll: Tensor
    reference_nll: Tensor
    kl: Tensor
    same_top: Tensor


def evaluate(
    model_dir: Path,
    text: str | Path,
    *,
    field: str = "text",
    window: int = 2048,
    stride: int | None = None,
    max_tokens: int | None = None,
    dtype: str = "auto",
    bos: str = "auto",
    against: Path | None = None,
    seed: int = 0,
    device: torch.device = CPU,
    progress: Progress | None = None,
    say: Say = unsaid,
) -> QualityReport:
    """Perplexity of `model_dir` on `text`, and the paired figures where `against` names a reference folder.

    The text is tokenised once, as far as `max_tokens` needs; `window` is clipped to the models' contexts, `stride`
    defaults to the window. dtype "auto" is each checkpoint's own. bos "auto": "window" for Gemma, "start" where the
    tokenizer itself puts one, else "none". `seed` is the bootstrap's. Both models are in the device's memory together;
    logits go to float32 a few rows at a time. `progress` is told windows done and in all; `say` what was chosen in
    silence: a clipped window, too few windows.
    Raises CheckpointError, CalibrationError, ConfigError (models that cannot be compared) and NumericalError.
    """
    started = time.monotonic()
    check_options(dtype, bos, seed, window, stride)
    tokenizer = load_tokenizer(model_dir)
    mode = resolve_bos(tokenizer, bos)
    ids, loaded, total = first_tokens(tokenizer, text, field, max_tokens)
    if against is not None:
        _check_same_tokenizer(tokenizer, load_tokenizer(against), loaded)
    configs = [config_of(folder) for folder in (model_dir, against) if folder is not None]
    _check_same_vocabulary(configs)
    context = min((length for config in configs if (length := context_length(config)) is not None), default=window)
    if context < window:
        say(f"windows are clipped to the model's context: {context} tokens instead of {window}")
    windows = plan_windows(ids, min(window, context), stride, max_tokens, mode, tokenizer.bos_token_id)
    if len(windows.sequences) < FEW_WINDOWS:
        say(f"intervals come from {len(windows.sequences)} windows and say little: give more text or a smaller window")
    model = load_model(model_dir, dtype, device)
    reference = load_model(against, dtype, device) if against is not None else None
    check_ids(tokenizer, torch.cat(windows.sequences).tolist(), model.get_input_embeddings().num_embeddings)
    scores = _score_all(model, reference, windows, progress)
    return QualityReport(
        model=str(model_dir),
        perplexity=estimate([score.nll for score in scores], exp_mean, seed),
        paired=None if reference is None else _paired(str(against), reference, scores, seed),
        convention=_convention(loaded, total, windows, max_tokens, mode, model),
        bootstrap={"resamples": RESAMPLES, "level": LEVEL, "seed": seed},
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )


def load_model(folder: Path, dtype: str = "auto", device: torch.device = CPU) -> Any:
    """Load a causal language model for inference: safetensors only, no remote code, no missing weights.

    Raises CheckpointError, and ConfigError for an unknown dtype.
    """
    _check_dtype(dtype)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json")
    return whole_model(folder, dtype=COMPUTE_DTYPES.get(dtype, "auto")).to(device)


def check_options(dtype: str, bos: str, seed: int, window: int, stride: int | None) -> None:
    """Refuse what needs neither model nor text to be judged. Raises ConfigError."""
    _check_dtype(dtype)
    if bos not in BOS_MODES:
        raise ConfigError(unknown("bos", bos, BOS_MODES))
    check_seed(seed)
    if stride is not None and stride > window:
        raise ConfigError(f"window {window} with stride {stride}: text between windows would be left out")


def _check_dtype(dtype: str) -> None:
    if dtype != "auto" and dtype not in COMPUTE_DTYPES:
        raise ConfigError(unknown("dtype", dtype, ["auto", *COMPUTE_DTYPES]))


def context_length(config: Any) -> int | None:
    """Longest sequence a transformers configuration allows, in tokens; None where it names none."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def resolve_bos(tokenizer: Any, bos: str) -> str:
    """Turn "auto" into "none", "start" or "window" for this tokenizer. Raises ConfigError."""
    if bos not in BOS_MODES:
        raise ConfigError(unknown("bos", bos, BOS_MODES))
    if bos in ("start", "window") and tokenizer.bos_token_id is None:
        raise ConfigError(f"bos '{bos}' needs a BOS token and this tokenizer has none")
    if bos != "auto":
        return bos
    if wants_bos_each_window(tokenizer):
        return "window"
    adds = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return "start" if adds else "none"


def plan_windows(
    ids: Tensor, window: int, stride: int | None, max_tokens: int | None, bos: str, bos_id: int | None
) -> Windows:
    """Cut a tokenised text (tokens,) into windows of `window` tokens, any BOS included; `stride` None: no overlap.

    `max_tokens` counts what is left of the text, a BOS at its start included. Raises as `window_spans` does.
    """
    leading = torch.tensor([] if bos_id is None else [bos_id], dtype=torch.long)
    if bos == "start":
        ids = torch.cat([leading, ids])
    ids = ids[:max_tokens]
    front = leading if bos == "window" else leading[:0]
    inner = window - len(front)
    step = inner if stride is None else stride
    spans = window_spans(ids.numel(), inner, step, score_first=len(front) > 0)
    return Windows(
        sequences=[torch.cat([front, ids[span.start : span.end]]) for span in spans],
        first_scored=[span.score_from - span.start + len(front) for span in spans],
        stride=step,
        tokens=spans[-1].end,
    )


def _check_same_tokenizer(tokenizer: Any, other: Any, text: Text) -> None:
    sample = text.joined[:10_000]
    same = tokenizer.get_vocab() == other.get_vocab()
    if not same or not torch.equal(tokenize(tokenizer, sample), tokenize(other, sample)):
        raise ConfigError("the two models have different tokenizers and cannot be compared token by token")


def _check_same_vocabulary(configs: list[Any]) -> None:
    sizes = [int(config.get_text_config().vocab_size) for config in configs]
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"the two models give logits for {sizes[0]} and {sizes[1]} tokens and cannot be compared; "
            f"bring their embeddings to one size"
        )


def _score_all(model: Any, reference: Any | None, windows: Windows, progress: Progress | None) -> list[_Scores]:
    scores, step = [], part(progress or silent, f"scoring {len(windows.sequences)} windows of text")
    for number, (ids, first) in enumerate(zip(windows.sequences, windows.first_scored, strict=True), start=1):
        scores.append(_score(model, reference, ids, first))
        if not torch.isfinite(scores[-1].nll + scores[-1].reference_nll + scores[-1].kl).all():
            raise NumericalError(f"window {number}: a model gives NaN or infinite likelihoods; its weights are damaged")
        step(number, len(windows.sequences))
    return scores


@torch.inference_mode()
def _score(model: Any, reference: Any | None, ids: Tensor, first: int) -> _Scores:
    """Score tokens `first` and on of one sequence (window,): token t is predicted by the logits at t - 1."""
    ids = ids.to(model.device)
    logits = _logits(model, ids)[first - 1 : -1]
    others = logits if reference is None else _logits(reference, ids)[first - 1 : -1]
    targets = ids[first:]
    parts = []
    for start in range(0, len(targets), LOGIT_ROWS):
        rows = slice(start, start + LOGIT_ROWS)
        chunk, other = logits[rows], others[rows]
        nll = token_nll(chunk, targets[rows])
        parts.append(
            (nll, nll, torch.zeros_like(nll), torch.ones_like(nll))
            if reference is None
            else (nll, token_nll(other, targets[rows]), kl_per_token(other, chunk), same_top_token(other, chunk))
        )
    return _Scores(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _logits(model: Any, ids: Tensor) -> Tensor:
    with third_party(f"transformers cannot compute with {model.config.name_or_path}", UnsupportedModel):
        logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


def _paired(name: str, reference: Any, scores: list[_Scores], seed: int) -> Paired:
    kl = [score.kl for score in scores]
    return Paired(
        reference=name,
        reference_dtype=_dtype_name(reference),
        reference_perplexity=estimate([score.reference_nll for score in scores], exp_mean, seed),
        perplexity_ratio=estimate([score.nll - score.reference_nll for score in scores], exp_mean, seed),
        kl_mean=estimate(kl, mean, seed),
        kl_p99=estimate(kl, p99, seed),
        same_top=estimate([score.same_top for score in scores], mean, seed),
    )


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _convention(
    text: Text, total: int | None, windows: Windows, max_tokens: int | None, bos: str, model: Any
) -> Convention:
    return Convention(
        text=text.source,
        sha256=text.sha256,
        text_tokens=total,
        max_tokens=max_tokens,
        tokens=windows.tokens,
        windows=len(windows.sequences),
        window=len(windows.sequences[0]),
        stride=windows.stride,
        predicted=windows.predicted,
        bos=bos,
        dtype=_dtype_name(model),
        device=str(model.device),
    )
