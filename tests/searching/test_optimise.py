"""Optimisers find what was planted; the journal keeps what was found."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from crepe_deploy.errors import ConfigError, MissingExtra, OutputError
from crepe_deploy.searching import optimise
from crepe_deploy.searching.hill_climb import hill_climb
from crepe_deploy.searching.hybrid import choose_filter, spearman, spread_out
from crepe_deploy.searching.optimise import cma_es, rank, to_unit
from crepe_deploy.searching.space import Setting, Space, anchors
from crepe_deploy.searching.surrogate import fit_surface, left_out
from crepe_deploy.store.journal import open_journal

START = anchors()["RIA, a = 0.5"]
PLANTED = [1.2, -1.0, 0.9, 5, 1]


def distance(settings: list[Setting]) -> list[float]:
    """Squared distance to the planted point in units of each axis; the whole-numbered axes must be hit exactly."""
    space = Space()
    found = []
    for setting in settings:
        gaps = [
            to_unit(value, axis) - to_unit(planted, axis)
            for value, planted, axis in zip(space.point(setting), PLANTED, space.axes, strict=True)
        ]
        found.append(sum(gap**2 for gap in gaps))
    return found


def test_cma_es_finds_the_planted_setting() -> None:
    found = cma_es(Space(), START, distance, evaluations=600, seed=0)
    params = found.best.params
    assert (params["kernel_size"], params["neighbourhood"]) == (15, "smooth" if PLANTED[4] else "ratio")
    assert params["exponent"] == pytest.approx(0.9, abs=0.03)
    assert math.log(params["beta"]) == pytest.approx(1.2, abs=0.2)
    assert math.log(params["gamma"]) == pytest.approx(-1.0, abs=0.3)


def test_hill_climbing_finds_the_planted_setting() -> None:
    found = hill_climb(Space(), START, distance, evaluations=300)
    assert found.best.params["kernel_size"] == 15
    assert found.ranked[0][1] < 0.01


def test_hill_climbing_never_ends_worse_than_it_began_and_stops_at_its_budget() -> None:
    asked: list[str] = []

    def rising(settings: list[Setting]) -> list[float]:
        asked.extend(setting.key for setting in settings)
        return [0.0 if setting.key == START.key else 1.0 for setting in settings]

    assert hill_climb(Space(), START, rising, evaluations=50).best == START
    assert len(asked) == len(set(asked))
    found = hill_climb(Space(), START, distance, evaluations=6)
    assert len(found.ranked) in (6, 7)
    assert len(hill_climb(Space(), START, distance, evaluations=50, expired=lambda: True).ranked) == 1


def test_equal_seeds_ask_for_equal_settings_and_others_do_not() -> None:
    runs = [
        [s.key for s, _ in cma_es(Space(), START, distance, evaluations=36, seed=seed).ranked] for seed in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_space_of_one_window_is_searched_all_the_same() -> None:
    found = cma_es(Space((7,)), START, distance, evaluations=60, seed=0)
    assert {setting.params["kernel_size"] for setting, _ in found.ranked} == {7}


def test_nan_is_never_the_best() -> None:
    found = cma_es(Space(), START, lambda each: [math.nan, *range(1, len(each))], evaluations=24, seed=0)
    assert found.ranked[0][1] == 1


def test_the_clock_stops_cma_es_after_a_generation() -> None:
    reports: list[int] = []
    cma_es(
        Space(), START, distance, evaluations=600, seed=0, expired=lambda: True,
        report=lambda asked, *_: reports.append(asked),
    )  # fmt: skip
    assert reports == [optimise.POPULATION]


def test_without_cmaes_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimise.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"crepe-deploy\[search\]"):
        cma_es(Space(), START, distance, evaluations=1, seed=0)


def test_spearman_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    left, right = generator.integers(6, size=30).tolist(), generator.random(30).tolist()
    assert spearman(left, right) == pytest.approx(stats.spearmanr(left, right).statistic)
    assert spearman([1, 1, 1], [1, 2, 3]) == 0.0


def test_the_filter_fits_a_sign_only_where_there_is_none() -> None:
    measured = {"gini": -0.9, "diagonal-error": -0.95, "sketch-error": 0.2, "token-error": 0.3, "retained-mass": 0.8}
    chosen = choose_filter({**measured, "fitted": 0.99}, "auto", 20)
    assert (chosen.proxy, chosen.sign) == ("gini", -1)
    assert choose_filter({**measured, "gini": 0.1}, "auto", 20).proxy == "token-error"
    assert choose_filter({**measured, "fitted": 0.1}, "auto", 20, number=1).proxy == "fitted"
    asked = choose_filter(measured, "retained-mass", 20)
    assert (asked.proxy, asked.sign) == ("retained-mass", -1)


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
    predicted = [surface(each) for each in proxies]
    assert spearman(predicted, kl) > 0.95 and spearman(left_out(proxies, kl), kl) > 0.85
    grid = [{"gini": g, "diagonal-error": e} for g in np.arange(0.5, 0.8, 0.01) for e in np.arange(0.05, 0.12, 0.005)]
    best = min(grid, key=surface)
    assert best["gini"] == pytest.approx(0.65, abs=0.03) and best["diagonal-error"] == pytest.approx(0.08, abs=0.015)


def test_the_surface_promises_nothing_for_noise() -> None:
    proxies, kl = planted_surface(20, 0.0)
    shuffled = np.random.default_rng(1).permutation(kl).tolist()
    assert spearman(left_out(proxies, shuffled), shuffled) < 0.4
    assert math.isfinite(fit_surface(proxies[:2], kl[:2])(proxies[3]))


def test_finalists_lie_apart() -> None:
    space = Space()
    near = [space.setting([0, 0, 0.5 + 0.01 * step, 2, 0]) for step in range(5)]
    far = space.setting([2, 0, 1.2, 2, 0])
    found = rank({setting.key: (setting, float(index)) for index, setting in enumerate([*near, far])})
    assert spread_out(space, found, 3, []) == [near[0], far]
    assert spread_out(space, found, 1, []) == [near[0]]
    assert spread_out(space, found, 3, [near[4], anchors()["Wanda"]]) == [far]


def journal(path: Path, **more: object) -> Path:
    book = open_journal(path, {"seed": 0, **more}, resume=False)
    book.add("proxies", "a", {"gini": 0.1 + 0.2})
    book.add("verdict", "a", {"kl": [1.5]})
    return path


def test_a_journal_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path = journal(tmp_path / "j")
    book = open_journal(path, {"seed": 0}, resume=True)
    assert book.get("proxies", "a") == {"gini": 0.1 + 0.2} and len(book) == 2
    assert book.get("verdict", "b") is None


def test_a_line_cut_short_is_evaluated_again(tmp_path: Path) -> None:
    path = journal(tmp_path / "j")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    book = open_journal(path, {"seed": 0}, resume=True)
    assert book.get("verdict", "a") is None and len(book) == 1
    book.add("verdict", "a", {"kl": [1.5]})
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace('"kind"', '"kin', 1), "line 2 is not JSON"),
        (lambda text: text.replace('"kind"', '"sort"', 1), "line 2 is no result"),
        (lambda text: text.replace("\n", "\n[]\n", 1), "line 2 is no object"),
        (lambda text: text[:10], "no complete line"),
        (lambda text: text.replace('"seed": 0', '"seed": 1'), "its seed is 1, this one's 0"),
        (lambda text: text.replace('"version": 1', '"version": 9'), "its version is 9"),
    ],
)
def test_a_damaged_or_foreign_journal_is_named(tmp_path: Path, damage: object, message: str) -> None:
    path = journal(tmp_path / "j")
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message) as refusal:
        open_journal(path, {"seed": 0}, resume=True)
    assert str(path) in str(refusal.value)


def test_a_journal_is_not_taken_for_granted(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with pytest.raises(ConfigError, match="nothing to resume"):
        open_journal(path, {}, resume=True)
    journal(path)
    with pytest.raises(OutputError, match="--resume"):
        open_journal(path, {"seed": 0}, resume=False)
    assert len(open_journal(path, {"seed": 0}, resume=False, overwrite=True)) == 0
    assert json.loads(path.read_text()) == {"version": 1, "seed": 0}
