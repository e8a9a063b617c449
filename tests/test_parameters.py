"""Parameters of methods and steps have their fields' types, wherever they come from."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from crepe_deploy.cli import run
from crepe_deploy.errors import ConfigError, CrepeError
from crepe_deploy.pruning.methods import METHODS, get_method
from crepe_deploy.pruning.recipe import load_preset, load_recipe
from crepe_deploy.pruning.steps import KINDS, build_step
from tests.mutations import SPOILT, mutations, refusal

WRITTEN = ("3.0", "NaN", "Infinity", "-1e999", "1e308", "true", "null", "[1]", "{}", '"x"', "x", "", "9" * 5000, "-1",
           "1e400", "2147483648", "0x10", "[" * 3000)  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_its_types_or_refuses(name: str) -> None:
    for field in fields(METHODS[name]):
        for value in (*SPOILT, float("nan"), float("inf"), 10**5000):
            try:
                built = get_method(name, **{field.name: value})
            except CrepeError as error:
                assert len(str(error)) < 500
            else:
                assert type(getattr(built, field.name)) is type(value)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, known in KINDS.items() for name in known])
def test_a_step_takes_its_types_or_refuses(kind: str, name: str) -> None:
    for field in fields(KINDS[kind][name]):
        for value in WRITTEN:
            try:
                build_step(kind, f"{name}:{field.name}={value}")
            except CrepeError as error:
                assert len(str(error)) < 500 or len(value) > 500


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("reconstruct", "admm:steps=3.0", "steps is 3.0; it must be a whole number"),
        ("reconstruct", "admm:penalty=x", "penalty is 'x'; it must be a number"),
        ("reconstruct", "exact:damping=NaN", "damping is 'NaN'; it must be a number"),
        ("permute", "fold:rounds=true", "rounds is True; it must be a whole number"),
    ],
)
def test_the_message_says_what_it_must_be(kind: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_step(kind, text)


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "--seed", "18446744073709551616"),
        ("prune", "--seed", "-1"),
        ("prune", "--calib-samples", "1" + "0" * 30),
        ("prune", "--calib-length", "9" * 5000),
        ("tyr", "--seed", "-1"),
        ("tyr", "--sparsity", "nan"),
        ("search", "--seed", "18446744073709551616"),
        ("search", "--minutes", "inf"),
        ("eval", "--seed", "-1"),
        ("eval", "--window", "1" + "0" * 30),
        ("gate", "--max-slowdown", "nan"),
        ("bench", "--rounds", "1" + "0" * 30),
    ],
)
def test_numbers_that_nothing_can_count_are_refused(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    command, *options = arguments
    assert run([command, "none", *options]) == 2
    assert f"Invalid value for '{options[0]}'" in capsys.readouterr().err


def survive(document: Any, path: Path, load: Any) -> None:
    for change, spoilt in mutations(document):
        path.write_text(json.dumps(spoilt))
        refusal(change, lambda: load(path))


def test_presets_and_recipes_spoilt_anywhere_are_refused_or_read(tmp_path: Path) -> None:
    preset = {"name": "a", "method": "crepe", "params": {"alpha": 1.0, "kernel_size": 7}, "provenance": {"a": [1]}}
    survive(preset, tmp_path / "p.json", load_preset)
    recipe = {"name": "a", "method": "ria", "params": {"exponent": 1}, "reprune": "dsnot", "provenance": {"a": [1]}}
    survive(recipe, tmp_path / "r.json", load_recipe)


@pytest.mark.parametrize("load", [load_preset, load_recipe])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "a", "name": "b", "method": "ria"}', "given twice"),
        ("name: a\nname: b\nmethod: ria", "given twice"),
        ('{"name": "a", "method": "ria", "params": {"exponent": ' + "9" * 5000 + "}}", "5000 digits"),
        ("[" * 3000, "nested deeper"),
        ('{"name": "\\ud800", "method": "ria"}', "surrogates"),
        ("\xff", "it: Input should be"),
        ("", "it: Input should be"),
    ],
)
def test_what_no_reader_should_take_is_refused(tmp_path: Path, load: Any, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "p.yaml")
