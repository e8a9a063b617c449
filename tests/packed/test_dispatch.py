"""The dispatcher: picks the fastest measured choice, remembers it, and survives a damaged memory."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from crepe_deploy.commands.doctor import choice_lines
from crepe_deploy.packed import dispatch
from crepe_deploy.packed.format import pack
from crepe_deploy.packed.linear import PackedLinear
from crepe_deploy.packed.prepare import Prepared, prepare
from crepe_deploy.packed.tuning.measurements import Timer, Times
from crepe_deploy.packed.tuning.tuner import TUNE_VARIABLE
from tests.packed.test_format import random_mask


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of measurements, and measuring allowed."""
    monkeypatch.setenv(TUNE_VARIABLE, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dispatch.TUNER.reread()
    yield tmp_path / "crepe-deploy" / "plans"
    dispatch.TUNER.reread()


def weight(rows: int = 24) -> Prepared:
    return prepare(*pack(torch.randn(rows, 64).bfloat16(), random_mask(rows, 64, 2, 4)))


def fake_timer(*seconds: float) -> Timer:
    """Answers these times in order, after running what it is asked to time; fails when asked more often."""
    left = list(seconds)

    def timer(runs: Mapping[str, Callable[[], object]]) -> Times:
        for run in runs.values():
            run()
        return {name: left.pop(0) for name in runs}

    return timer


def never(runs: Mapping[str, Callable[[], object]]) -> Times:
    raise AssertionError("measured again")


def plan_of(w: Prepared) -> list[int]:
    return dispatch.plan_for(w).tolist()


def test_buckets() -> None:
    sizes = [0, 1, 2, 3, 4, 5, 8, 9, 64, 65, 256, 257, 512, 100_000]
    assert [dispatch.bucket(size) for size in sizes] == [0, 0, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 9, 9]


def test_the_fastest_is_chosen_and_remembered(cache: Path) -> None:
    w = weight()
    plan = dispatch.plan_for(w)
    assert plan.tolist() == [0] * dispatch.BUCKETS
    assert not dispatch.tune(w, plan, (1,), timer=fake_timer(3, 2, 4, 1))
    assert dispatch.NAMES[int(plan[0])] == "tile"
    dispatch.tune(w, plan, (3, 4, 64), timer=fake_timer(1, 2, 4, 9, 3, 2, 1))
    assert [dispatch.NAMES[int(plan[i])] for i in (2, 6)] == ["stream", "expand"]
    dispatch.TUNER.reread()  # as a new process
    assert plan_of(w) == plan.tolist()
    dispatch.tune(w, dispatch.plan_for(w), (1, 4, 64), timer=never)
    assert plan_of(weight(28)) == [0] * dispatch.BUCKETS
    report = dispatch.describe_plan(w, plan)
    assert report["1"]["gain_over_dense"] == 0.5
    assert report["above 256"]["choice"] == "auto"


def test_a_near_tie_goes_to_the_choice_that_allocates_least() -> None:
    assert dispatch.TUNER.fastest({"stream": 1.07, "tile": 1.0, "expand": 1.0}) == "stream"
    assert dispatch.TUNER.fastest({"stream": 1.2, "tile": 1.02, "expand": 1.0}) == "tile"


def test_dense_only_where_a_copy_is_kept_and_clearly_faster() -> None:
    times = {"tile": 1.0, "expand": 2.0, "dense": 0.9}
    assert dispatch.TUNER.fastest(times) == "tile"
    assert dispatch.TUNER.fastest(times, keep_dense=True) == "dense"
    assert dispatch.TUNER.fastest({**times, "dense": 0.97}, keep_dense=True) == "tile"
    assert dispatch.TUNER.fastest({"tile": 1.0, "expand": 0.8, "dense": 0.99}) == "tile"


def test_keep_dense_auto_buys_speed_with_memory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, mask_bytes = pack(torch.randn(16, 64).bfloat16(), random_mask(16, 64, 2, 4))
    layer = PackedLinear.from_packed(values, mask_bytes, 2, 4)
    layer.keep_dense = "auto"
    x = torch.randn(64, 64).bfloat16()
    before = layer(x)
    monkeypatch.setattr(dispatch, "best_times", fake_timer(3, 2, 1))
    layer.tune((32,))
    assert layer.describe()["dense_copy"]
    assert layer.describe()["plan"]["32"]["choice"] == "dense"
    torch.testing.assert_close(layer(x), before, rtol=2e-2, atol=2e-2)
    layer.keep_dense = "never"
    layer.tune((32,))
    assert not layer.describe()["dense_copy"]


def test_the_first_call_measures_its_bucket(cache: Path) -> None:
    values, mask_bytes = pack(torch.randn(16, 64).bfloat16(), random_mask(16, 64, 2, 4))
    layer = PackedLinear.from_packed(values, mask_bytes, 2, 4)
    layer(torch.randn(2, 64).bfloat16())
    plan = layer.kernel_plan.tolist()
    assert plan[1] != 0
    assert sum(code != 0 for code in plan) == 1
    assert len(list(cache.iterdir())) == 1


def test_tuning_can_be_turned_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TUNE_VARIABLE, "0")
    w = weight()
    plan = dispatch.plan_for(w)
    assert not dispatch.tune(w, plan, (1, 64), timer=never)
    assert plan.tolist() == [0] * dispatch.BUCKETS
    assert not cache.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        json.dumps({"version": 99, "machine": {}, "times_ms": {}}),
        json.dumps({"version": 1, "machine": {"cpu": "another"}, "times_ms": {}}),
        "MACHINE null",
        "MACHINE [1]",
        'MACHINE {"k": {"warp": 1}}',
        'MACHINE {"k": {}}',
        'MACHINE {"k": {"tile": -1}}',
        'MACHINE {"k": {"tile": "x"}}',
        'MACHINE {"k": {"dense": 1}}',
    ],
)
def test_a_damaged_cache_counts_as_empty_and_is_replaced(cache: Path, content: str) -> None:
    if content.startswith("MACHINE"):
        machine = json.dumps(dispatch.machine())
        content = f'{{"version": 1, "machine": {machine}, "times_ms": {content.removeprefix("MACHINE")}}}'
    path = dispatch.TUNER.path()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert dispatch.TUNER.measured == {}
    w = weight()
    dispatch.tune(w, dispatch.plan_for(w), (1,), timer=fake_timer(1, 2, 3, 4))
    dispatch.TUNER.reread()
    assert list(dispatch.TUNER.measured) == [dispatch.key(w, 0)]


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where a folder should be")
    w = weight()
    dispatch.tune(w, dispatch.plan_for(w), (1,), timer=fake_timer(1, 2, 3, 4))
    assert "cannot be kept" in caplog.text


def test_measured_choices_are_listed_for_doctor(cache: Path) -> None:
    w = weight()
    dispatch.tune(w, dispatch.plan_for(w), (1, 64), timer=fake_timer(3, 2, 4, 6, 3, 5, 1.5))
    first, second = dispatch.choices()
    assert (first["shape"], first["batch"], first["choice"], first["gain_over_dense"]) == ([24, 64], 1, "tile", 3.0)
    assert (second["batch"], second["choice"], second["gain_over_dense"]) == (64, "tile", 0.5)
    (line,) = choice_lines([first, second])
    assert "24x64 bfloat16, 50% kept" in line
    assert "by batch, speed over dense (higher is better): 1: tile 3.00x, 64: tile 0.50x" in line


def test_describe_says_what_was_chosen_and_why() -> None:
    report = dispatch.describe()
    assert report["isa"] in report["supported"]
    assert report["reason"]
    assert report["machine"]["torch"] == torch.__version__


def test_choices_take_turns_until_each_best_was_seen_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    costs = {"tile": iter([5.0, 9.0, 2.0, 3.0, 2.01]), "dense": iter([4.0] * 9)}  # other work hits tile at first

    def run(name: str) -> None:
        order.append(name)
        clock[0] += next(costs[name])

    monkeypatch.setattr(dispatch.time, "perf_counter", lambda: clock[0])
    found = dispatch.best_times({name: functools.partial(run, name) for name in costs})
    assert found == {"tile": pytest.approx(2.0), "dense": pytest.approx(4.0)}
    assert order == ["tile", "dense"] * 5


def test_measuring_ends_where_times_never_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, runs = [0.0], []

    def run() -> None:
        runs.append(None)
        clock[0] += 1.5 ** len(runs)

    monkeypatch.setattr(dispatch.time, "perf_counter", lambda: clock[0])
    dispatch.best_times({"tile": run})
    assert len(runs) == 12


def test_forgetting_measures_anew(cache: Path) -> None:
    w = weight()
    dispatch.tune(w, dispatch.plan_for(w), (1,), timer=fake_timer(3, 2, 4, 1))
    path = dispatch.TUNER.forget()
    assert not path.exists()
    assert plan_of(w) == [0] * dispatch.BUCKETS
    dispatch.tune(w, dispatch.plan_for(w), (1,), timer=fake_timer(1, 2, 4, 1))
    dispatch.TUNER.forget()
    dispatch.TUNER.forget()  # nothing there is no error
