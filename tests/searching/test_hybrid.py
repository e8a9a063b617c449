"""PHO's parts: the settings it begins with, the filter it chooses, the finalists it spreads out."""

from __future__ import annotations

import math

import pytest

from crepe_deploy.searching.hybrid import choose_filter, latin_hypercube, spearman, spread_out
from crepe_deploy.searching.optimise import rank
from crepe_deploy.searching.space import Space, anchors


def test_spearman_knows_ties_and_constants() -> None:
    assert spearman([1, 2, 3], [10, 20, 40]) == 1.0 and spearman([1, 2, 3], [3, 2, 1]) == -1.0
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_a_hypercube_uses_every_slice_of_every_axis_once() -> None:
    space, count = Space(), 14
    settings = latin_hypercube(space, count, seed=3)
    points = [setting.params for setting in settings]
    exponents = sorted(int(params["exponent"] / 1.5 * count) for params in points)
    assert exponents == list(range(count))
    assert latin_hypercube(space, count, seed=3) == settings != latin_hypercube(space, count, seed=4)
    assert {params["kernel_size"] for params in points} <= set(space.kernel_sizes)
    assert len({params["neighbourhood"] for params in points}) == 2


def test_the_filter_fits_a_sign_only_where_there_is_none() -> None:
    measured = {"gini": -0.9, "diagonal-error": -0.95, "sketch-error": 0.2, "token-error": 0.3, "retained-mass": 0.8}
    chosen = choose_filter({**measured, "fitted": 0.99}, "auto", 20)
    assert (chosen.proxy, chosen.sign) == ("gini", -1)
    assert choose_filter({**measured, "gini": 0.1}, "auto", 20).proxy == "token-error"
    assert choose_filter({**measured, "fitted": 0.1}, "auto", 20, number=1).proxy == "fitted"
    asked = choose_filter(measured, "retained-mass", 20)
    assert (asked.proxy, asked.sign) == ("retained-mass", -1)


def test_finalists_lie_apart() -> None:
    space = Space()
    near = [space.setting([0, 0, 0.5 + 0.01 * step, 2, 0]) for step in range(5)]
    far = space.setting([2, 0, 1.2, 2, 0])
    ranking = rank({setting.key: (setting, float(index)) for index, setting in enumerate([*near, far])})
    assert spread_out(space, ranking, 3, []) == [near[0], far]
    assert spread_out(space, ranking, 1, []) == [near[0]]
    assert spread_out(space, ranking, 3, [near[4], anchors()["Wanda"]]) == [far]
