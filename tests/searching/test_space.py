"""The searched box: what it holds, what it refuses."""

from __future__ import annotations

import pytest
import torch

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.stats import Stats
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.methods import get_method
from crepe_deploy.pruning.methods.base import ScoreMethod
from crepe_deploy.searching.hybrid import latin_hypercube
from crepe_deploy.searching.space import FORMS, Setting, Space, anchors
from crepe_deploy.select import select


def test_the_box_holds_ria_and_every_form() -> None:
    space = Space()
    ria = anchors()["RIA, a = 0.5"]
    assert space.setting(space.point(ria)).key == ria.key
    for index, form in enumerate(FORMS):
        setting = space.setting([0.0, 0.0, 0.75, 2, index])
        assert setting.params == {
            "alpha": 1.0, "beta": 1.0, "gamma": 1.0, "exponent": 0.75, "kernel_size": 7, "neighbourhood": form
        }  # fmt: skip


def test_the_corner_of_the_box_makes_wandas_masks() -> None:
    torch.manual_seed(0)
    weight, stats = torch.randn(12, 32), Stats(col_norm=torch.rand(32) + 0.1)
    corner = Space().setting([-3.5, -7, 1.0, 0, 0]).build()
    wanda = get_method("wanda")
    assert isinstance(corner, ScoreMethod) and isinstance(wanda, ScoreMethod)
    masks = [select(method.score(weight, stats), NM(2, 4)) for method in (corner, wanda)]
    assert torch.equal(*masks)


def test_without_a_neighbourhood_its_window_makes_no_second_setting() -> None:
    space = Space()
    assert space.setting([0, -7, 0.5, 0, 0]).key == space.setting([0, -6.5, 0.5, 5, 1]).key


def test_a_point_of_the_box_survives_the_way_there_and_back() -> None:
    space = Space(kernel_sizes=(3, 7))
    for setting in latin_hypercube(space, 20, seed=1):
        again = space.setting(space.point(setting))
        assert again.params["neighbourhood"] == setting.params["neighbourhood"]
        numbers = [{**own.params, "neighbourhood": 0} for own in (again, setting)]
        assert numbers[0] == pytest.approx(numbers[1], rel=2e-4)


def test_the_hypercube_uses_every_slice_once_and_every_window() -> None:
    space = Space()
    settings = latin_hypercube(space, 14, seed=0)
    exponents = sorted(int(setting.params["exponent"] / 1.5 * 14) for setting in settings)
    assert exponents == list(range(14))
    assert {round(space.point(setting)[3]) for setting in settings if setting.params["gamma"]} <= set(range(7))
    assert [s.key for s in latin_hypercube(space, 14, seed=0)] == [s.key for s in settings]
    assert [s.key for s in latin_hypercube(space, 14, seed=1)] != [s.key for s in settings]


@pytest.mark.parametrize(
    ("sizes", "widest", "message"),
    [
        ((3, 4), 100, "kernel_size is 4"),
        ((7, 3), 100, "must ascend"),
        ((), 100, "at least one"),
        ((3, 31), 30, "kernel size 31 exceeds 30"),
    ],
)
def test_windows_that_cannot_be_are_refused(sizes: tuple[int, ...], widest: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Space(sizes, widest)


def test_keys_tell_settings_apart() -> None:
    assert Setting("wanda", {}).key != Setting("magnitude", {}).key
    assert Setting("crepe", {"beta": 1.0, "alpha": 1.0}).key == Setting("crepe", {"alpha": 1.0, "beta": 1.0}).key
