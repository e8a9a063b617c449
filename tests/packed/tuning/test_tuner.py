"""The tuner of every dispatcher: measures once, remembers, and looks a choice up once for each kind of layer."""

from __future__ import annotations

from pathlib import Path

import pytest

from crepe_deploy.packed.tuning.measurements import Times
from crepe_deploy.packed.tuning.tuner import TUNE_VARIABLE, Tuner, bucket_of, tuning_allowed

ORDER = ("stream", "tile", "expand", "dense")
TIMES = {"stream a": 3.0, "stream b": 1.0, "tile": 2.0, "expand": 4.0, "dense": 2.0}


@pytest.fixture
def tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tuner:
    """A tuner of this test's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Tuner(lambda: {"cpu": "one"}, {*TIMES}.__contains__, ORDER, tie=1.05, dense_gain=0.9)


def test_what_is_known_is_not_measured_again(tuner: Tuner) -> None:
    measured: list[str] = []

    def measure(name: str) -> Times:
        measured.append(name)
        return dict(TIMES)

    for _ in range(2):
        times = tuner.times({name: lambda name=name: measure(name) for name in ("8x8/bucket0", "8x8/bucket1")})
        assert times == {"8x8/bucket0": TIMES, "8x8/bucket1": TIMES}
        tuner.reread()  # as a new process: the file knows
    assert measured == ["8x8/bucket0", "8x8/bucket1"]
    assert tuner.entries()[1] == (["8x8"], {"batch": 2, "choice": "stream b", "gain_over_dense": 2.0})


def test_a_choice_is_looked_up_once_until_something_new_is_measured(tuner: Tuner) -> None:
    asked: list[str] = []

    def usable(name: str) -> bool:
        asked.append(name)
        return name != "stream b"

    assert tuner.choice("k/bucket0", "no copy", usable, keep_dense=False) is None
    tuner.remember({"k/bucket0": dict(TIMES)})
    for _ in range(3):
        assert tuner.choice("k/bucket0", "no copy", usable, keep_dense=False) == "tile"
    assert sorted(asked) == sorted(TIMES)
    assert tuner.choice("k/bucket0", "a copy", lambda name: name != "stream b", keep_dense=True) == "tile"
    tuner.remember({"k/bucket0": {**TIMES, "dense": 1.0}})
    assert tuner.choice("k/bucket0", "a copy", lambda name: name != "stream b", keep_dense=True) == "dense"
    assert tuner.choice("k/bucket0", "dense alone", lambda name: name == "dense", keep_dense=True) is None
    tuner.forget()
    assert tuner.choice("k/bucket0", "no copy", usable, keep_dense=False) is None


def test_near_equals_of_one_kind_go_to_the_faster(tuner: Tuner) -> None:
    assert tuner.fastest({"stream a": 1.04, "stream b": 1.02, "tile": 1.0}) == "stream b"
    assert tuner.fastest({"stream a": 1.2, "tile": 1.04, "expand": 1.0}) == "tile"


def test_buckets_end_at_powers_of_two_and_the_last_takes_the_rest() -> None:
    assert [bucket_of(tokens, 4) for tokens in (0, 1, 2, 3, 4, 5, 8, 9, 1000)] == [0, 0, 1, 2, 2, 3, 3, 3, 3]


def test_measuring_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TUNE_VARIABLE, raising=False)
    assert tuning_allowed()
    monkeypatch.setenv(TUNE_VARIABLE, "0")
    assert not tuning_allowed()
