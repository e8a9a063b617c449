"""Scenarios from files and options: what they mean, and that mistakes are named with the file, the key and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from crepe_deploy.bench.commands.bench import DEFAULT_POINTS, build_scenario, short_names
from crepe_deploy.bench.run.result import Point, workload_sha256
from crepe_deploy.bench.run.scenario import Scenario, load_scenario, parse, parse_points

from crepe_deploy.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "name": "s",
    "candidates": [{"name": "dense", "folder": "models/dense"}, {"name": "packed", "folder": "/abs/packed"}],
    "points": [{"prompt_tokens": 8, "output_tokens": 4}],
}
NONE_GIVEN: dict[str, Any] = dict.fromkeys(
    ("baseline", "engine", "points", "rounds", "threads", "text", "max_tokens")
) | {"aa": False, "window": 512}


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "scenario.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_minimal_file_has_usable_defaults(tmp_path: Path) -> None:
    scenario = load_scenario(write(tmp_path, MINIMAL))
    assert scenario.baseline_name == "dense"
    assert scenario.candidates[0].folder == tmp_path / "models" / "dense", "relative to the file"
    assert scenario.candidates[1].folder == Path("/abs/packed")
    assert scenario.workload().points == [Point(name="b1-p8-o4", prompt_tokens=8, output_tokens=4)]
    assert scenario.thread_count() >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ronds": 3}, "unknown key 'ronds'; known are name, candidates, .*rounds"),
        ({"points": [{"prompt_tokens": 8, "output_tokens": 4, "bach": 2}]}, "unknown key 'points.0.bach'.*batch"),
        ({"candidates": [{"name": "a", "folder": "x", "model": "y"}]}, "unknown key 'candidates.0.model'.*folder"),
        ({"quality": {"text": "t", "stride": 3}}, "unknown key 'quality.stride'; known are text, window, max_tokens"),
        ({"points": []}, "points: list should have at least 1 item"),
        ({"points": [{"prompt_tokens": 8}]}, "'points.0.output_tokens' is missing"),
        ({"points": [{"prompt_tokens": 0, "output_tokens": 4}]}, "prompt_tokens: input should be greater"),
        ({"points": 2 * MINIMAL["points"]}, "more than one point is named 'b1-p8-o4'"),
        ({"candidates": 2 * [{"name": "a", "folder": "x"}]}, "more than one candidate is named 'a'"),
        ({"baseline": "none"}, "baseline 'none' is no candidate; there are dense, packed"),
        ({"rounds": 0}, "rounds: input should be greater"),
        ({"rounds": "many"}, "rounds: input should be a valid integer"),
    ],
)
def test_mistakes_name_the_file_and_the_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, MINIMAL | change)
    with pytest.raises(ConfigError, match=message) as caught:
        load_scenario(path)
    assert str(path) in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", ".name. is given twice"),
        ("name: [", "is not YAML"),
        ("- 1\n", "must be a mapping with the keys name, candidates"),
        ("", "must be a mapping"),
    ],
)
def test_what_is_no_scenario_is_said(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_scenario(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml is missing"):
        load_scenario(tmp_path / "none.yaml")


def test_an_aa_run_measures_the_baseline_twice_and_first() -> None:
    specs = parse(MINIMAL | {"baseline": "packed", "aa": True}, "x").specs()
    assert [arm.name for arm in specs] == ["packed", "packed again", "dense"]
    assert specs[0].folder == specs[1].folder
    taken = [*MINIMAL["candidates"], {"name": "dense again", "folder": "z"}]
    with pytest.raises(ConfigError, match="'dense again' for its second arm"):
        parse(MINIMAL | {"aa": True, "candidates": taken}, "x")


def test_candidates_inherit_what_they_do_not_say() -> None:
    own = {"name": "own", "folder": "o", "engine": "transformers", "dtype": "float32"}
    content = MINIMAL | {"engine": "vllm", "dtype": "bfloat16", "options": {"compiled": True}}
    inherits, differs = parse(content | {"candidates": [MINIMAL["candidates"][0], own]}, "x").specs()
    assert (inherits.engine, inherits.dtype, inherits.options) == ("vllm", "bfloat16", {"compiled": True})
    assert (differs.engine, differs.dtype, differs.options) == ("transformers", "float32", {})


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"dtype": "float32"}, {"engine": "transformers"}, {"options": {"compiled": True}}]
)
def test_what_changes_the_work_changes_the_workload(change: dict[str, Any]) -> None:
    first, second = (workload_sha256(parse(content, "x").workload()) for content in (MINIMAL, MINIMAL | change))
    assert first != second


def test_rounds_and_folders_do_not_change_the_workload() -> None:
    moved = {"rounds": 30, "candidates": [{"name": "dense", "folder": "elsewhere"}]}
    assert parse(MINIMAL | moved, "x").workload() == parse(MINIMAL, "x").workload()


def test_points_of_the_command_line() -> None:
    points = [Scenario.model_validate(MINIMAL | {"points": [p]}).points[0] for p in parse_points("4x64+32*3, 8@128+16")]
    assert [spec.point() for spec in points] == [
        Point(name="b4-p64-o32", prompt_tokens=64, output_tokens=32, batch=4, requests=3),
        Point(name="c8-p128-o16", prompt_tokens=128, output_tokens=16, concurrency=8),
    ]
    assert parse_points(DEFAULT_POINTS)


@pytest.mark.parametrize("text", ["", "1x6", "x64+3", "1x64+0", "1x64+3*", "ax64+3", "1@64x3", "-1x6+3"])
def test_points_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is no point: write BATCHxPROMPT"):
        parse_points(text)


def test_folders_become_a_scenario_with_the_dense_one_first(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "packed", tmp_path / "b" / "packed", tmp_path / "dense"]
    for folder in folders:
        folder.mkdir(parents=True)
    scenario = build_scenario(folders, **NONE_GIVEN | {"baseline": str(folders[2]), "engine": "fake", "rounds": 3})
    assert scenario.baseline_name.endswith("/dense") and scenario.rounds == 3
    assert [candidate.name for candidate in scenario.candidates][1:] == ["a/packed", "b/packed"]
    with pytest.raises(ConfigError, match="is no folder"):
        build_scenario([*folders, tmp_path / "none"], **NONE_GIVEN | {"engine": "fake"})


def test_options_override_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL | {"quality": {"text": "t"}})
    scenario = build_scenario(
        [path], **NONE_GIVEN | {"rounds": 2, "points": "2x8+4", "baseline": "packed", "threads": 1}
    )
    assert (scenario.rounds, scenario.baseline_name, scenario.thread_count()) == (2, "packed", 1)
    assert [spec.batch for spec in scenario.points] == [2]
    assert scenario.quality is not None and scenario.quality.text == tmp_path / "t"
    with pytest.raises(ConfigError, match="baseline 'none'"):
        build_scenario([path], **NONE_GIVEN | {"baseline": "none"})


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names([Path("/m/a"), Path("/m/b")]) == ["a", "b"]
    assert short_names([Path("/m/a/x"), Path("/m/b/x")]) == ["a/x", "b/x"]
    with pytest.raises(ConfigError, match="twice"):
        short_names([Path("/m/a"), Path("/m/a")])


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[3].glob("configs/bench-*.yaml")), ids=lambda p: p.stem)
def test_shipped_scenarios_are_valid(path: Path) -> None:
    scenario = load_scenario(path)
    assert scenario.made_by or all(candidate.folder.exists() for candidate in scenario.candidates)
