"""A response surface over proxies: the KL that judged settings had, as a quadratic of their proxies; ours.

A single proxy only says in which direction damage lies, and its own optimum is an extreme (the diagonal error's is
Wanda). A quadratic of two can have its optimum in between. With y = log KL and z the standardised logarithms of
`FEATURES`, ridge regression on (1, z, z^2, z_i z_j), the constant not shrunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

NAME = "fitted"
FEATURES = ("gini", "diagonal-error")
RIDGE = 0.3
TINY = 1e-12


@dataclass(frozen=True)
class Surface:
    """A fitted quadratic. centre, scale: (features,), of the logarithms it was fitted on. weights: of the terms."""

    centre: Array
    scale: Array
    weights: Array
    level: float

    def __call__(self, proxies: Mapping[str, float]) -> float:
        """Predicted log KL of a setting with these proxies."""
        terms = _terms((_logs([proxies]) - self.centre) / self.scale)
        return float(terms[0] @ self.weights) + self.level


def fit_surface(proxies: Sequence[Mapping[str, float]], kl: Sequence[float]) -> Surface:
    """Fit on settings that were judged; any number of them, ridge keeps the answer unique."""
    logs, target = _logs(proxies), np.log(np.maximum(np.asarray(kl, dtype=float), TINY))
    centre, scale = logs.mean(0), logs.std(0) + TINY
    terms = _terms((logs - centre) / scale)
    offset, level = terms.mean(0), float(target.mean())
    centred = terms - offset
    gram = centred.T @ centred + RIDGE * np.eye(terms.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (target - level))
    return Surface(centre, scale, weights, level - float(offset @ weights))


def left_out(proxies: Sequence[Mapping[str, float]], kl: Sequence[float]) -> list[float]:
    """For every judged setting the prediction of a surface fitted on the others: what the fit is worth."""
    predicted = []
    for index in range(len(kl)):
        others = [other for other in range(len(kl)) if other != index]
        surface = fit_surface([proxies[other] for other in others], [kl[other] for other in others])
        predicted.append(surface(proxies[index]))
    return predicted


def _logs(proxies: Sequence[Mapping[str, float]]) -> Array:
    values = np.array([[values[name] for name in FEATURES] for values in proxies], dtype=np.float64)
    logs: Array = np.log(np.maximum(values, TINY))
    return logs


def _terms(values: Array) -> Array:
    """(n, features) -> (n, terms): linear, squares, products."""
    count = values.shape[1]
    products = [values[:, i] * values[:, j] for i in range(count) for j in range(i, count)]
    return np.column_stack([values, *products])
