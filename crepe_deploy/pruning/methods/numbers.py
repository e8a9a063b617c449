"""Weights as numbers: sizes that fp32 can square, errors that name their layer, what no solver may make of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from crepe_deploy.errors import NumericalError
from crepe_deploy.model.stats import Stats

LOW, HIGH = -40, 50  # exponents of a largest weight between which squares, and sums of them, stay within fp32
LOST = 0.01  # of the kept weights, at most, that may come out as exactly zero though their inputs are not


@contextlib.contextmanager
def naming(layer: str) -> Iterator[None]:
    """Errors of the arithmetic inside say which layer it was."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{layer}: {error}") from error


def exponent_of(weight: Tensor) -> int:
    """The power of two that brings a weight within reach of fp32's squares; 0 for all but odd weights.

    Small ones are brought to 1; large ones no further than must be, for the others are then perhaps of common size.
    """
    size = _size(weight)
    if size is None or LOW <= size <= HIGH:
        return 0
    return (HIGH if size > HIGH else 0) - size


def with_drift(exponent: int, stats: Stats) -> tuple[int, Stats]:
    """The power of two for a layer that is to make up for `stats.drift`, which grows with it, and those statistics."""
    size = None if stats.drift is None or not exponent else _size(stats.drift)
    if stats.drift is None or size is None:
        return exponent, stats
    exponent = min(exponent, HIGH - size)
    return exponent, replace(stats, drift=scaled(stats.drift, exponent))


def _size(tensor: Tensor) -> int | None:
    """The exponent of the largest entry; None where all are zero."""
    low, high = tensor.aminmax()
    largest = max(abs(float(low)), abs(float(high)))
    return math.frexp(largest)[1] if largest else None


def scaled(weight: Tensor, exponent: int) -> Tensor:
    """`weight` times two to that power, fp32; itself where the exponent is 0."""
    return (weight.double() * 2.0**exponent).float() if exponent else weight


def check_kept(before: Tensor, after: Tensor, mask: Tensor, norms: Tensor | None) -> dict[str, float]:
    """What a solver made of the kept weights (out, in), and a note where it zeroed those of inputs that were never on.

    norms: (in,) of the inputs. Raises NumericalError for a weight that the dtype does not hold, and for kept weights
    that are gone: more than `LOST` of those with an input, or half of all.
    """
    name = str(after.dtype).removeprefix("torch.")
    if not after.isfinite().all():
        raise NumericalError(
            f"the updated weight does not fit {name}: the weight or its calibration statistics are damaged; give other "
            "text, or leave the layer out"
        )
    gone = mask & (after == 0) & (before != 0)
    count, kept = int(gone.sum()), int(mask.sum())
    if not count:
        return {}
    dead = torch.zeros_like(after[0], dtype=torch.bool) if norms is None else norms == 0
    alive = int(gone[:, ~dead].sum())
    if alive > LOST * kept or count > kept / 2:
        raise NumericalError(
            f"the update left {count} of the {kept} kept weights zero in {name}, and {int(dead.sum())} of {len(dead)} "
            "inputs are zero on the whole calibration text: give more text, or leave the layer out"
        )
    return {"zeros_of_dead_inputs": float(count - alive)} if count > alive else {}
