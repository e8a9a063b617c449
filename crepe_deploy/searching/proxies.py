"""Proxies for the damage of a mask: pure tensor functions of what was kept of a layer, no model and no text.

On n sampled rows of one layer, W (n, in) are the weights, S the scores, M the mask (True = keep), E = W where M is
False, d (in,) the norms of the inputs, Y (r, in) the sketch of the inputs and Z the one of inputs of length 1:

gini             Gini index of the pruned scores S*M, all entries counted; PHO's proxy as far as it is published (Park,
                 arXiv 2606.01544). Its definition, its sign and its aggregation are not, so the sign is fitted.
diagonal-error   ||E diag(d)||^2 / ||W diag(d)||^2: the layer's output error if inputs were uncorrelated (Wanda's view)
sketch-error     ||E Y^T||^2 / ||W Y^T||^2: the same with all correlations, up to the sketch (SparseGPT's objective)
token-error      ||E Z^T||^2 / ||W Z^T||^2: every token counts the same, whatever its length; ours
retained-mass    sum(S*M) / sum(S): what RIA's channel permutation maximises

A model's value is the mean over its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.nearest import unknown
from crepe_deploy.pattern import Pattern
from crepe_deploy.select import select

from .sample import LayerSample, score_band
from .space import Setting
from .surrogate import NAME

TINY = 1e-30


@dataclass(frozen=True)
class Rows:
    """Sampled rows of one layer under one candidate; tensors as in the module's docstring, fp32, mask bool."""

    weight: Tensor
    score: Tensor
    mask: Tensor
    col_norm: Tensor
    sketch: Tensor
    token_sketch: Tensor


@dataclass(frozen=True)
class Proxy:
    """A function of `Rows`. sign: +1 where more means more damage, -1 where less does, 0 where it must be fitted."""

    function: Callable[[Rows], float]
    sign: int


def gini_index(values: Tensor) -> float:
    """sum_i (2i - n - 1) s_(i) / (n sum s) over values >= 0 sorted ascending, i from 1; 0 where all are 0."""
    ordered = np.sort(values.reshape(-1).numpy())
    size = len(ordered)
    ranks = 2 * np.arange(1, size + 1, dtype=np.float64) - size - 1
    total = ordered.sum(dtype=np.float64)
    return float(ranks @ ordered / (size * total)) if total > 0 else 0.0


def pruned_score_gini(rows: Rows) -> float:
    """Gini index of S*M over all entries, the pruned ones as zeros."""
    return gini_index(rows.score * rows.mask)


def diagonal_error(rows: Rows) -> float:
    """Squared output error over squared output, inputs taken as uncorrelated."""
    squares = (rows.weight * rows.col_norm).square_()
    return _ratio(squares.sum() - (squares * rows.mask).sum(), squares.sum())


def sketch_error(rows: Rows) -> float:
    """Squared output error over squared output, by the sketch of the inputs."""
    return _output_error(rows, rows.sketch)


def token_error(rows: Rows) -> float:
    """As `sketch_error`, with every token's input brought to length 1."""
    return _output_error(rows, rows.token_sketch)


def retained_mass(rows: Rows) -> float:
    """Share of the score that the mask keeps."""
    return _ratio((rows.score * rows.mask).sum(), rows.score.sum())


PROXIES: dict[str, Proxy] = {
    "gini": Proxy(pruned_score_gini, 0),
    "diagonal-error": Proxy(diagonal_error, 1),
    "sketch-error": Proxy(sketch_error, 1),
    "token-error": Proxy(token_error, 1),
    "retained-mass": Proxy(retained_mass, -1),
}


def check_proxy(name: str) -> None:
    """Raise ConfigError, listing the known names, unless `name` is a proxy, "auto" or the fitted surface."""
    known = ("auto", *PROXIES, NAME)
    if name not in known:
        raise ConfigError(unknown("proxy", name, known))


@torch.inference_mode()
def proxy_values(
    setting: Setting, layers: list[LayerSample], pattern: Pattern, group: int | None = None
) -> dict[str, float]:
    """Every proxy of a setting: means over `layers`, from all bands of each, or from its band number `group` alone.

    N:M and per-row patterns give the rows exactly the masks that they get in the whole matrix; a pattern over the
    whole matrix is applied to the sampled rows instead. Raises ConfigError for a method that is not searched.
    """
    method = setting.build()
    totals = dict.fromkeys(PROXIES, 0.0)
    for layer in layers:
        bands = layer.bands if group is None else layer.bands[group : group + 1]
        score = torch.cat([score_band(method, layer, band) for band in bands])
        weight = torch.cat([band.rows for band in bands])
        rows = Rows(weight, score, select(score, pattern), layer.col_norm, layer.sketch, layer.token_sketch)
        for name, proxy in PROXIES.items():
            totals[name] += proxy.function(rows) / len(layers)
    return totals


def proxy_errors(setting: Setting, layers: list[LayerSample], pattern: Pattern) -> dict[str, float]:
    """Standard errors of `proxy_values` from having sampled rows, by the spread between the bands (random groups).

    Each band of a layer lies at random in its own part of the rows, and the g-th bands of all layers form one
    replicate. An upper estimate where a matrix was small enough to be taken whole.
    """
    count = min(len(layer.bands) for layer in layers)
    groups = [proxy_values(setting, layers, pattern, group) for group in range(count)]
    if count < 2:
        return dict.fromkeys(PROXIES, float("inf"))
    return {name: float(np.std([values[name] for values in groups], ddof=1)) / count**0.5 for name in PROXIES}


def _output_error(rows: Rows, sketch: Tensor) -> float:
    lost = (rows.weight * ~rows.mask) @ sketch.T
    return _ratio(lost.square().sum(), (rows.weight @ sketch.T).square().sum())


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part) / max(float(whole), TINY)
