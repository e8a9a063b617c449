"""From what a person writes to a resolved configuration, and what it refuses without a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from crepe_deploy.errors import ConfigError, PatternError
from crepe_deploy.pattern import NM, Pattern, Unstructured
from crepe_deploy.pruning.config import PruneConfig, prune_config
from crepe_deploy.pruning.methods.crepe import Crepe
from crepe_deploy.pruning.methods.magnitude import Magnitude
from crepe_deploy.pruning.methods.ria import RIA
from crepe_deploy.pruning.methods.sparsegpt import SparseGPT
from crepe_deploy.pruning.methods.wanda import Wanda
from crepe_deploy.pruning.recipe import load_preset
from crepe_deploy.pruning.steps.reconstruct import Exact, Obs

DEFAULT = Crepe(**load_preset("default").params)
PRESET = "name: mine\nmethod: wanda\n"
RECIPE = "name: mine\nmethod: ria\nparams: {exponent: 1.0}\nreconstruct: obs\nfeed: pruned\n"


def test_without_arguments_it_is_crepe_to_2_4() -> None:
    config = prune_config()
    assert (config.method, config.pattern, config.feed) == (DEFAULT, NM(2, 4), "dense")
    assert (config.origin.method, config.origin.preset, config.origin.recipe) == ("crepe", "default", None)


def test_a_method_comes_from_its_name_the_preset_or_the_default(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(PRESET)
    assert prune_config("crepe", params={"gamma": 2.0}).method == dataclasses.replace(DEFAULT, gamma=2.0)
    assert prune_config("sparsegpt", params={"damping": 0.1}).method == SparseGPT(0.1)
    assert prune_config("sparsegpt").origin.preset is None
    assert prune_config(preset="ria").method == Crepe(gamma=0.0)
    config = prune_config(preset=tmp_path / "mine.yaml")
    assert (config.method, config.origin.method, config.origin.preset) == (Wanda(), "wanda", "mine")
    with pytest.raises(ConfigError, match="is for method 'wanda', not 'crepe'"):
        prune_config("crepe", preset=tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("written", "pattern"),
    [
        ("16:32", NM(16, 32)),
        (NM(1, 4), NM(1, 4)),
        (0.5, Unstructured(0.5)),
        ("0.7", Unstructured(0.7)),
        ("0.7/row", Unstructured(0.7)),
        ("0.6/matrix", Unstructured(0.6, "matrix")),
    ],
)
def test_patterns_as_a_person_writes_them(written: Pattern | str | float, pattern: Pattern) -> None:
    assert prune_config("magnitude", written).pattern == pattern


@pytest.mark.parametrize("written", ["4:2", "half", "0.5/column", 1.5])
def test_patterns_that_mean_nothing(written: str | float) -> None:
    with pytest.raises(PatternError):
        prune_config("magnitude", written)


def test_arguments_go_before_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE)
    plain = prune_config(recipe=recipe)
    assert (plain.method, plain.steps.reconstruct, plain.feed) == (RIA(1.0), Obs(), "pruned")
    assert plain.origin.recipe == "mine"
    changed = prune_config(recipe=recipe, params={"exponent": 0.5}, reconstruct="exact:damping=0.2", feed="both")
    assert (changed.method, changed.steps.reconstruct, changed.feed) == (RIA(0.5), Exact(damping=0.2), "both")
    other = prune_config("wanda", recipe=recipe)
    assert (other.method, other.steps.reconstruct) == (Wanda(), Obs())


@pytest.mark.parametrize(
    ("arguments", "feed"),
    [
        ({"method": "wanda"}, "dense"),
        ({"method": "sparsegpt"}, "pruned"),
        ({"method": "wanda", "reconstruct": "exact"}, "both"),
        ({"method": "sparsegpt", "feed": "dense"}, "dense"),
    ],
)
def test_the_feed_is_resolved(arguments: dict[str, Any], feed: str) -> None:
    assert prune_config(**arguments).feed == feed
    assert prune_config(**arguments).record()["feed"] == feed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "wunda"}, "known: magnitude, wanda"),
        ({"feed": "sideways"}, "feed 'sideways' is unknown; known: auto, dense, pruned, both"),
        ({"feed": "both"}, "--feed both collects what only --reconstruct, --repair and the sweep of --values use"),
        ({"rescale": "logits"}, "give --reconstruct and --feed both"),
        ({"rescale": "logits", "reconstruct": "exact", "feed": "pruned"}, "give --reconstruct and --feed both"),
        ({"dtype": "int3"}, "dtype 'int3' is unknown; known: auto, float32"),
        ({"include": "("}, "not a regular expression"),
        ({"exclude": "("}, "not a regular expression"),
        ({"params": {"speed": 1}}, "no hyperparameter 'speed'"),
        ({"permute": "fold", "pattern": 0.5}, r"--permute changes nothing for pattern 0\.5/row"),
        ({"reprune": "swaps", "pattern": 0.5}, r"works in N:M groups, not in 0\.5/row; use dsnot"),
        ({"method": "sparsegpt", "reprune": "dsnot"}, "--reprune undoes the weights that 'sparsegpt' updates"),
    ],
)
def test_what_cannot_work_is_refused_without_a_model(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune_config(**arguments)


def test_a_configuration_cannot_be_made_or_changed_into_what_does_not_go_together() -> None:
    config = prune_config("magnitude", 0.5)
    with pytest.raises(ConfigError, match="--feed both"):
        dataclasses.replace(config, feed="both")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.feed = "pruned"  # type: ignore[misc]


def test_only_what_reads_statistics_needs_text() -> None:
    assert not prune_config("magnitude").needs_text
    assert not prune_config("magnitude", "16:32", allocate="alpha").needs_text
    assert prune_config("magnitude", "16:32", allocate="owl").needs_text
    assert prune_config("magnitude", reconstruct="obs").needs_text
    assert prune_config("wanda").needs_text


def test_the_record_names_what_was_asked_and_what_it_came_to() -> None:
    config = prune_config("magnitude", "16:32", allocate="alpha:spread=0.5", include="mlp")
    assert isinstance(config, PruneConfig)
    assert config.method == Magnitude()
    assert config.record() == {
        "method": "magnitude",
        "pattern": "16:32",
        "params": {},
        "preset": None,
        "feed": "dense",
        "include": "mlp",
        "exclude": None,
        "dtype": "auto",
        "allocate": "alpha:spread=0.5",
        "permute": None,
        "reprune": None,
        "reconstruct": None,
        "repair": None,
        "rescale": None,
        "recipe": None,
        "resolved_method": {"class": "Magnitude"},
        "resolved_steps": {"allocate": {"class": "Alpha", "spread": 0.5}},
    }


def test_steps_are_recorded_as_manifests_always_had_them() -> None:
    steps = prune_config(recipe="best").record()["resolved_steps"]
    assert {kind: step["class"] for kind, step in steps.items()} == {
        "permute": "Fold",
        "reconstruct": "Admm",
        "rescale": "Logits",
    }
