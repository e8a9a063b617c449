"""Optimisers find what was planted; the journal keeps what was found."""

from __future__ import annotations

import importlib.util
import math

import pytest

from crepe_deploy.errors import MissingExtra
from crepe_deploy.searching import optimise
from crepe_deploy.searching.hill_climb import hill_climb
from crepe_deploy.searching.optimise import cma_es, to_unit
from crepe_deploy.searching.space import Setting, Space, anchors

START = anchors()["RIA, a = 0.5"]
PLANTED = [1.2, -1.0, 0.9, 5, 1]


def distance(settings: list[Setting]) -> list[float]:
    """Squared distance to the planted point in units of each axis; the whole-numbered axes must be hit exactly."""
    space = Space()
    distances = []
    for setting in settings:
        gaps = [
            to_unit(value, axis) - to_unit(planted, axis)
            for value, planted, axis in zip(space.point(setting), PLANTED, space.axes, strict=True)
        ]
        distances.append(sum(gap**2 for gap in gaps))
    return distances


def test_cma_es_finds_the_planted_setting() -> None:
    ranking = cma_es(Space(), START, distance, evaluations=600, seed=0)
    params = ranking.best.params
    assert (params["kernel_size"], params["neighbourhood"]) == (15, "smooth" if PLANTED[4] else "ratio")
    assert params["exponent"] == pytest.approx(0.9, abs=0.03)
    assert math.log(params["beta"]) == pytest.approx(1.2, abs=0.2)
    assert math.log(params["gamma"]) == pytest.approx(-1.0, abs=0.3)


def test_hill_climbing_finds_the_planted_setting() -> None:
    ranking = hill_climb(Space(), START, distance, evaluations=300)
    assert ranking.best.params["kernel_size"] == 15
    assert ranking.ranked[0][1] < 0.01


def test_hill_climbing_never_ends_worse_than_it_began_and_stops_at_its_budget() -> None:
    asked: list[str] = []

    def rising(settings: list[Setting]) -> list[float]:
        asked.extend(setting.key for setting in settings)
        return [0.0 if setting.key == START.key else 1.0 for setting in settings]

    assert hill_climb(Space(), START, rising, evaluations=50).best == START
    assert len(asked) == len(set(asked))
    ranking = hill_climb(Space(), START, distance, evaluations=6)
    assert len(ranking.ranked) in (6, 7)
    assert len(hill_climb(Space(), START, distance, evaluations=50, expired=lambda: True).ranked) == 1


def test_equal_seeds_ask_for_equal_settings_and_others_do_not() -> None:
    runs = [
        [s.key for s, _ in cma_es(Space(), START, distance, evaluations=36, seed=seed).ranked] for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_space_of_one_window_is_searched_all_the_same() -> None:
    ranking = cma_es(Space((7,)), START, distance, evaluations=60, seed=0)
    assert {setting.params["kernel_size"] for setting, _ in ranking.ranked} == {7}


def test_nan_is_never_the_best() -> None:
    ranking = cma_es(Space(), START, lambda settings: [math.nan, *range(1, len(settings))], evaluations=24, seed=0)
    assert ranking.ranked[0][1] == 1


def test_the_clock_stops_cma_es_after_a_generation() -> None:
    reports: list[int] = []
    cma_es(
        Space(), START, distance, evaluations=600, seed=0, expired=lambda: True,
        report=lambda asked, *_: reports.append(asked),
    )  # fmt: skip
    assert reports == [optimise.POPULATION]


def test_without_cmaes_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"crepe-deploy\[search\]"):
        cma_es(Space(), START, distance, evaluations=1, seed=0)
