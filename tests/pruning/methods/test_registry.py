"""The registry, hyperparameter checks and presets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.stats import Stats
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.methods import METHODS, get_method
from crepe_deploy.pruning.methods.base import ScoreMethod, SolveMethod
from crepe_deploy.pruning.methods.crepe import Crepe
from crepe_deploy.pruning.methods.ria import RIA
from crepe_deploy.pruning.recipe import Preset, known_presets, load_preset


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_one_form(name: str) -> None:
    method = get_method(name)
    assert type(method) is METHODS[name]
    assert isinstance(method, ScoreMethod) != isinstance(method, SolveMethod)
    assert method.needs <= {"col_norm", "hessian"}


def test_hyperparameters_are_passed_on() -> None:
    assert get_method("ria", exponent=0.25) == RIA(0.25)
    assert get_method("crepe", gamma=0, kernel_size=3) == Crepe(gamma=0, kernel_size=3)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ConfigError, match="'obs' is unknown; known: magnitude, wanda, ria, crepe, sparsegpt"):
        get_method("obs")
    with pytest.raises(ConfigError, match="no hyperparameter 'delta'; known: alpha, beta, gamma, kernel_size"):
        get_method("crepe", delta=1)
    with pytest.raises(ConfigError, match="no hyperparameter 'exponent'; known: none"):
        get_method("magnitude", exponent=1)
    with pytest.raises(ConfigError, match="no hyperparameter 'needs'"):
        get_method("wanda", needs=frozenset())


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("ria", {"exponent": -0.1}),
        ("ria", {"exponent": float("nan")}),
        ("ria", {"exponent": "1"}),
        ("ria", {"exponent": True}),
        ("ria", {"exponent": None}),
        ("ria", {"exponent": 10**20}),
        ("crepe", {"beta": 2**63}),
        ("crepe", {"alpha": -1}),
        ("crepe", {"beta": float("inf")}),
        ("crepe", {"gamma": -0.3}),
        ("crepe", {"alpha": 0, "beta": 0, "gamma": 0}),
        ("crepe", {"kernel_size": 4}),
        ("crepe", {"kernel_size": -3}),
        ("crepe", {"kernel_size": 7.0}),
        ("crepe", {"kernel_size": True}),
        ("crepe", {"neighbourhood": "box"}),
        ("crepe", {"neighbourhood": "group"}),
        ("crepe", {"neighbourhood": "group", "kernel_size": 0}),
        ("crepe", {"neighbourhood": "column", "kernel_size": 4}),
        ("crepe", {"neighbourhood": ["ratio"]}),
        ("sparsegpt", {"damping": 0}),
        ("sparsegpt", {"damping": 2}),
        ("sparsegpt", {"max_damping": 0.001}),
        ("sparsegpt", {"block_size": 0}),
        ("sparsegpt", {"block_size": 12.5}),
    ],
)
def test_values_out_of_range(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r" is |are all 0"):
        get_method(name, **params)


def test_shipped_presets() -> None:
    assert {"default", "ria"} <= set(known_presets())
    for name in known_presets():
        preset = load_preset(name)
        assert preset.name == name
        assert preset.provenance
        config = prune_config(preset=name)
        assert type(config.method) is METHODS[preset.method]
        assert (config.origin.method, config.origin.preset) == (preset.method, name)


def test_ria_preset_is_ria() -> None:
    weight, stats = torch.randn(20, 40), Stats(col_norm=torch.rand(40))
    method = prune_config(preset="ria").method
    assert isinstance(method, ScoreMethod)
    assert torch.equal(method.score(weight, stats), RIA().score(weight, stats))


def write(folder: Path, text: str) -> str:
    path = folder / "mine.json"
    path.write_text(text)
    return str(path)


GOOD = {"name": "mine", "method": "wanda", "params": {}, "provenance": {"note": "by hand"}}


def test_preset_from_a_file(tmp_path: Path) -> None:
    preset = Preset(name="mine", method="wanda", params={}, provenance={"note": "by hand"})
    assert load_preset(write(tmp_path, json.dumps(GOOD))) == preset
    assert load_preset(write(tmp_path, "name: mine\nmethod: wanda\nprovenance: {note: by hand}")) == preset


def test_a_preset_by_kind_of_layer(tmp_path: Path) -> None:
    content = {"name": "mine", "method": "crepe", "params": {"exponent": 0.75}, "kinds": {"q_proj": {"gamma": 0.5}}}
    config = prune_config(preset=write(tmp_path, json.dumps(content)), params={"beta": 2.0})
    assert config.method == Crepe(exponent=0.75, beta=2.0)
    assert config.kinds == {"q_proj": Crepe(exponent=0.75, gamma=0.5, beta=2.0)}
    assert config.record()["kinds"] == {"q_proj": vars(config.kinds["q_proj"])}
    assert "kinds" not in prune_config().record()


def test_numbers_of_json_are_numbers(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-05 as a word."""
    content = json.dumps({**GOOD, "method": "ria", "params": {"exponent": 1e-05}})
    assert "1e-05" in content
    assert load_preset(write(tmp_path, content)).params == {"exponent": 1e-05}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "it: Input should be a valid dictionary"),
        (json.dumps({**GOOD, "extra": 1}), "extra: Extra inputs are not permitted"),
        (json.dumps({**GOOD, "feed": "both"}), "feed: Extra inputs are not permitted"),
        (json.dumps({"name": "mine"}), "method: Field required"),
        (json.dumps({**GOOD, "params": []}), "params: Input should be a valid dictionary"),
        (json.dumps({**GOOD, "method": "obs"}), "method 'obs' is unknown"),
        (json.dumps({**GOOD, "params": {"gamma": 1}}), "no hyperparameter 'gamma'"),
        (json.dumps({**GOOD, "method": "ria", "params": {"exponent": "x"}}), "exponent is 'x'"),
        (json.dumps({**GOOD, "method": "ria", "kinds": {"q_proj": {"exponent": "x"}}}), "exponent is 'x'"),
        (json.dumps({**GOOD, "kinds": {"q_proj": 1}}), "kinds.q_proj: Input should be a valid dictionary"),
        (json.dumps({**GOOD, "method": "sparsegpt", "kinds": {"q_proj": {}}}), "no coefficients by kind of layer"),
    ],
)
def test_damaged_preset_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_preset(write(tmp_path, text))


def test_unreadable_and_missing_presets(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load_preset(str(tmp_path / "binary.json"))
    with pytest.raises(ConfigError, match="known: default, pho, ria"):
        load_preset("nothing")
