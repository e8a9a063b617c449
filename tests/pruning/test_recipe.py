"""Recipes: strict files, options that go before them, and a shipped one that runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from crepe_deploy.cli import cli
from crepe_deploy.errors import ConfigError
from crepe_deploy.pattern import NM, Pattern, Unstructured
from crepe_deploy.pruning.config import Origin, prune_config
from crepe_deploy.pruning.methods import METHODS
from crepe_deploy.pruning.recipe import Recipe, known_recipes, load_recipe
from crepe_deploy.pruning.steps import KINDS
from crepe_deploy.store.manifest import load_manifest
from tests.pico import make_pico_llama, sample_text


@pytest.mark.parametrize("name", known_recipes())
def test_every_shipped_recipe_builds(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.provenance
    assert recipe.method in METHODS
    config = prune_config(recipe=name)
    assert config.origin == Origin(
        recipe.method, None, name, {kind: text for kind in KINDS if (text := getattr(recipe, kind)) is not None}
    )
    assert vars(config.steps).keys() == KINDS.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nreconstrcut: exact", "reconstrcut: Extra inputs are not permitted"),
        ("method: ria", "name: Field required"),
        ("name: a\nfeed: twice", "feed: Input should be 'auto', 'dense', 'pruned' or 'both'"),
        ("name: a\nheal: 0", "heal: Input should be greater than 0"),
        ("name: 3", "name: Input should be a valid string"),
        ("- a", "it: Input should be a valid dictionary"),
        ("name: [", "is not YAML"),
    ],
)
def test_a_wrong_recipe_names_its_fault(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(tmp_path / "r.yaml"))


def test_healed_is_best_and_then_heals() -> None:
    apart = {"name", "provenance", "heal"}
    best, healed = (load_recipe(name).model_dump(exclude=apart) for name in ("best", "healed"))
    assert best == healed and load_recipe("best").heal is None and load_recipe("healed").heal == 30


def test_prune_does_not_heal_and_says_who_does(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    (tmp_path / "calib.txt").write_text(sample_text(300), encoding="utf-8")
    arguments = ["prune", str(model), "--recipe", "healed", "--calib", str(tmp_path / "calib.txt")]
    result = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code != 0 and isinstance(result.exception, ConfigError)
    assert "prune-and-export" in str(result.exception) and not (tmp_path / "out").exists()


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"neither a file nor a known name; known: .*best"):
        load_recipe("bset")


def test_json_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"name": "mine", "method": "wanda", "params": {}}))
    assert load_recipe(str(tmp_path / "r.json")) == Recipe(name="mine", method="wanda")


def test_the_command_line_prunes_by_recipe_and_options_go_first(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    (tmp_path / "calib.txt").write_text(sample_text(3000), encoding="utf-8")
    (tmp_path / "r.yaml").write_text(
        "name: mine\nmethod: ria\nparams: {exponent: 1.0}\nreprune: dsnot\nreconstruct: obs"
    )
    common = [
        "prune",
        str(model),
        "--calib",
        str(tmp_path / "calib.txt"),
        "--calib-samples",
        "4",
        "--calib-length",
        "32",
    ]

    def config(out: str, *options: str) -> dict[str, object]:
        arguments = [*common, "--out", str(tmp_path / out), "--recipe", str(tmp_path / "r.yaml"), *options]
        result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        return load_manifest(tmp_path / out).config

    plain = config("a")
    assert (plain["recipe"], plain["method"], plain["reprune"], plain["reconstruct"]) == ("mine", "ria", "dsnot", "obs")
    assert plain["params"] == {"exponent": 1.0}
    changed = config("b", "--reconstruct", "exact:damping=0.1", "--param", "exponent=0.5", "--feed", "dense")
    assert (changed["reconstruct"], changed["params"]) == ("exact:damping=0.1", {"exponent": 0.5})
    assert changed["feed"] == "dense"
    other = config("c", "--method", "wanda")
    assert (other["method"], other["params"], other["reprune"]) == ("wanda", {}, "dsnot")


def test_a_permutation_is_for_groups_alone() -> None:
    recipe = Recipe(name="mine", method="ria", permute="fold", reconstruct="exact")
    assert recipe.options(NM(2, 4)) == {"method": "ria", "feed": "auto", "permute": "fold", "reconstruct": "exact"}
    assert "permute" not in recipe.options(Unstructured(0.5))


@pytest.mark.parametrize("pattern", [0.5, "0.5", "0.5/matrix", Unstructured(0.5)])
def test_a_recipe_with_a_permutation_serves_every_pattern(pattern: Pattern | str | float) -> None:
    assert prune_config(recipe="best", pattern=pattern).steps.permute is None
    assert prune_config(recipe="best", pattern="2:4").steps.permute is not None
