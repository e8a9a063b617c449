"""The maths of evaluating language models: windows, negative log likelihood, KL, bootstrap. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from crepe_deploy.errors import CalibrationError, ConfigError

RESAMPLES = 1000
LEVEL = 0.95

_LOWER: Final = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter"}

Statistic = Callable[["np.ndarray[Any, Any]"], float]


@dataclass(frozen=True)
class Span:
    """Text tokens [start, end) of one window; tokens from `score_from` on are predicted and scored."""

    start: int
    end: int
    score_from: int


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval over windows; no interval (None) where there is a single window."""

    value: float
    low: float | None
    high: float | None


def better(metric: str) -> Literal["lower", "higher"]:
    """Which way a metric of lm-eval is better."""
    return "lower" if metric in _LOWER else "higher"


def window_spans(n_tokens: int, window: int, stride: int, *, score_first: bool = False) -> list[Span]:
    """Windows of `window` tokens every `stride` tokens; an incomplete last one is left out.

    Each token is scored at most once: a window scores what the one before did not reach. The first token of a window
    has no context and is not scored, unless `score_first` (a BOS stands in front of it).
    Raises ConfigError for sizes that make no sense and CalibrationError for less than one window of text.
    """
    if window + score_first < 2 or not 1 <= stride <= window:
        raise ConfigError(f"window {window} with stride {stride}: it needs 1 <= stride <= window and 2 tokens or more")
    if n_tokens < window:
        raise CalibrationError(
            f"the text has {n_tokens} tokens, {window - n_tokens} short of one window of {window}: "
            f"give more text or a smaller window"
        )
    spans: list[Span] = []
    for start in range(0, n_tokens - window + 1, stride):
        reached = spans[-1].end if spans else 0
        spans.append(Span(start, start + window, max(reached, start + (0 if score_first else 1))))
    return spans


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood in nats, float32 (n,), of `targets` (n,) under `logits` (n, vocabulary)."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def kl_per_token(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || model) in nats, float32 (n,), of two (n, vocabulary) sets of logits; never below 0."""
    reference = torch.log_softmax(reference_logits.float(), dim=-1)
    model = torch.log_softmax(logits.float(), dim=-1)
    return torch.nn.functional.kl_div(model, reference, reduction="none", log_target=True).sum(-1).clamp_min(0)


def same_top_token(reference_logits: Tensor, logits: Tensor) -> Tensor:
    """Whether both (n, vocabulary) sets of logits rank the same token first, float32 (n,) of 0 and 1."""
    return (reference_logits.argmax(-1) == logits.argmax(-1)).float()


def bootstrap_interval(
    values_by_window: Sequence[Tensor],
    statistic: Statistic,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of `statistic` over the concatenated values of windows drawn with replacement.

    Windows, not tokens, are drawn, for tokens of one window are not independent. None for fewer than two windows.
    Equal seeds draw equal windows, so that figures of one run stay paired.
    """
    if len(values_by_window) < 2:
        return None
    arrays = [values.double().numpy() for values in values_by_window]
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(arrays), size=(resamples, len(arrays)))
    results = [statistic(np.concatenate([arrays[index] for index in draw])) for draw in draws]
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def estimate(values_by_window: Sequence[Tensor], statistic: Statistic, seed: int = 0) -> Estimate:
    """`statistic` over all values, with its bootstrap interval."""
    value = statistic(torch.cat(list(values_by_window)).double().numpy())
    low, high = bootstrap_interval(values_by_window, statistic, seed=seed) or (None, None)
    return Estimate(value, low, high)


def mean(values: np.ndarray[Any, Any]) -> float:
    """Arithmetic mean."""
    return float(values.mean())


def exp_mean(values: np.ndarray[Any, Any]) -> float:
    """exp of the mean: perplexity of negative log likelihoods, or the ratio of perplexities of their differences."""
    return float(np.exp(values.mean()))


def p99(values: np.ndarray[Any, Any]) -> float:
    """99th percentile, interpolated."""
    return float(np.quantile(values, 0.99))
