"""Rescaling: one factor on the last norm, so on every logit, that brings a pruned model nearest to the dense one.

Weights fitted to calibration text make a model too sure of itself on any other text. So some calibration windows are
held out from everything before, and the factor is the one that minimises the mean KL(dense || pruned) over them: a
temperature (Guo et al., ICML 2017) with the dense model for labels, folded into the last norm at no cost at run time.
It reorders no tokens: perplexity, sampling and the scores of whole texts change, greedy decoding does not (but for
rounding, and in models that cap their logits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crepe_deploy.errors import NumericalError, UnsupportedModel
from crepe_deploy.model.decoder import Decoder, Head
from crepe_deploy.model.families import family_of, known

from ..methods.base import check_range

FACTORS = tuple(step / 20 for step in range(14, 24))  # 0.7 to 1.15
ROWS = 64  # tokens whose logits are worked on at a time


@dataclass(frozen=True)
class Rescaled:
    """The factor, and the mean KL(dense || pruned) in nats over the held-out windows without and with it.

    The factor and the KL with it are the bottom of a parabola between the factors that were tried (see `minimum`).
    """

    factor: float
    kl_before: float
    kl: float


@dataclass(frozen=True)
class LogitRescaler:
    """windows: how many are held out, but never more than a quarter of the calibration windows."""

    windows: int = 8
    recorded_as: ClassVar[str] = "Logits"  # in manifests, those of earlier versions among them

    def __post_init__(self) -> None:
        check_range("windows", self.windows, 1)

    @torch.inference_mode()
    def fit(self, decoder: Decoder, head: Head, tokens: Tensor, dense: Tensor, pruned: Tensor) -> Rescaled:
        """tokens (windows, length) int64; dense, pruned (windows, length, width): states behind the last block.

        `head` of `decoder` is left as it was. Raises UnsupportedModel where the last norm is not known, NumericalError
        for NaN.
        """
        names, added = last_norm(decoder)
        sums = torch.zeros(len(FACTORS), dtype=torch.float64)
        stored = [decoder.model.get_parameter(name) for name in names]
        before = [parameter.clone() for parameter in stored]

        def logits(ids: Tensor, hidden: Tensor, factor: float) -> Tensor:
            for parameter, value in zip(stored, before, strict=True):
                parameter.copy_(scaled(value, factor, added))
            return head(ids[None], hidden[None])[0]

        for ids, wanted, reached in zip(tokens, dense, pruned, strict=True):
            reference = logits(ids, wanted, 1.0).float().softmax(-1)
            for index, factor in enumerate(FACTORS):
                sums[index] += cross_entropy(reference, logits(ids, reached, factor))
            sums += float(torch.xlogy(reference, reference).sum(dtype=torch.float64) / len(reference))
        for parameter, value in zip(stored, before, strict=True):
            parameter.copy_(value)
        divergences = (sums / len(tokens)).tolist()
        if not sum(divergences) < float("inf"):
            raise NumericalError("the pruned model gives NaN or infinite logits on the held-out calibration windows")
        factor, least = minimum(FACTORS, divergences)
        return Rescaled(factor, divergences[FACTORS.index(1.0)], least)


RESCALERS: dict[str, type[LogitRescaler]] = {"logits": LogitRescaler}


def cross_entropy(reference: Tensor, logits: Tensor) -> float:
    """Mean over tokens, in nats; reference: probabilities (tokens, vocabulary) fp32, logits of the same shape."""
    total = 0.0
    for start in range(0, len(reference), ROWS):
        rows = logits[start : start + ROWS].float()
        expected = torch.linalg.vecdot(reference[start : start + ROWS], rows)
        total += float((rows.logsumexp(-1) - expected).sum(dtype=torch.float64))
    return total / len(reference)


def last_norm(decoder: Decoder) -> tuple[list[str], float]:
    """Names of the last norm's parameters in the module tree, and what is added to a stored gain before it is used."""
    kind = decoder.config.model_type
    family = family_of(kind)
    if not family.last_norm:
        raise UnsupportedModel(f"--rescale does not know the last norm of '{kind}'; known: {known('last_norm')}")
    names = [name for name, _ in decoder.model.named_parameters() if name.startswith(f"{family.last_norm}.")]
    if not names:
        raise UnsupportedModel(f"--rescale scales the last norm, and this '{kind}' has none")
    return names, family.gain_added


@torch.inference_mode()
def rescale_head(decoder: Decoder, head: Head, factor: float) -> None:
    """Scale the last norm of `head`, which is of `decoder`: in the module and, in the file's dtype, in its weights."""
    names, added = last_norm(decoder)
    for name in names:
        key = decoder.key(name)
        head.weights[key] = scaled(head.weights[key], factor, added)
        decoder.model.get_parameter(name).copy_(head.weights[key])


def scaled(stored: Tensor, factor: float, added: float) -> Tensor:
    """What to store so that gain + `added` becomes `factor` times what it is with `stored`; same dtype."""
    return ((stored.double() + added) * factor - added).to(stored.dtype)


def minimum(places: tuple[float, ...], values: list[float]) -> tuple[float, float]:
    """(place, value) at the bottom of the parabola through the least of `values` and its neighbours.

    places: ascending, evenly spaced. The first or last place where that is the least: nothing is extrapolated.
    """
    index = min(range(len(values)), key=values.__getitem__)
    if index in (0, len(values) - 1):
        return places[index], values[index]
    left, middle, right = values[index - 1 : index + 2]
    bend = left - 2 * middle + right
    if bend <= 0:
        return places[index], middle
    shift = (left - right) / (2 * bend)
    return places[index] + shift * (places[index + 1] - places[index]), middle - (left - right) ** 2 / (8 * bend)
