"""The response surface: it finds a planted optimum and promises nothing for noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from crepe_deploy.searching.hybrid import spearman
from crepe_deploy.searching.surrogate import fit_surface, left_out


def planted_surface(count: int, noise: float) -> tuple[list[dict[str, float]], list[float]]:
    """Proxies and a KL with its least value inside their range, at gini 0.65 and error 0.08."""
    generator = np.random.default_rng(0)
    gini, error = generator.uniform(0.5, 0.8, count), generator.uniform(0.05, 0.12, count)
    kl = 1.8 * np.exp(20 * np.log(gini / 0.65) ** 2 + 3 * np.log(error / 0.08) ** 2)
    kl *= np.exp(noise * generator.standard_normal(count))
    return [{"gini": g, "diagonal-error": e} for g, e in zip(gini, error, strict=True)], kl.tolist()


def test_the_surface_finds_an_optimum_between_the_extremes_of_its_proxies() -> None:
    proxies, kl = planted_surface(20, 0.01)
    surface = fit_surface(proxies, kl)
    predicted = [surface(values) for values in proxies]
    assert spearman(predicted, kl) > 0.95 and spearman(left_out(proxies, kl), kl) > 0.85
    grid = [{"gini": g, "diagonal-error": e} for g in np.arange(0.5, 0.8, 0.01) for e in np.arange(0.05, 0.12, 0.005)]
    best = min(grid, key=surface)
    assert best["gini"] == pytest.approx(0.65, abs=0.03) and best["diagonal-error"] == pytest.approx(0.08, abs=0.015)


def test_the_surface_promises_nothing_for_noise() -> None:
    proxies, kl = planted_surface(20, 0.0)
    shuffled = np.random.default_rng(1).permutation(kl).tolist()
    assert spearman(left_out(proxies, shuffled), shuffled) < 0.4
    assert math.isfinite(fit_surface(proxies[:2], kl[:2])(proxies[3]))
