"""The public API: its page's examples run, it imports nothing heavy, and no import order hides a function."""

from __future__ import annotations

import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import crepe_deploy
from crepe_deploy.api.inputs import find_model, windows_of
from crepe_deploy.cli import cli
from crepe_deploy.errors import CalibrationError, ConfigError
from crepe_deploy.texts import CalibrationSet
from tests.pico import make_pico_llama, sample_text
from tests.pico_moe import make_moe

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = (
    "doctor",
    "evaluate",
    "experts",
    "export",
    "heal",
    "inspect",
    "plan",
    "prune",
    "prune_and_export",
    "search",
    "tyr",
    "verify",
)


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the model and the texts that the page names."""
    make_pico_llama(tmp_path / "model", torch.bfloat16, num_attention_heads=8, num_key_value_heads=4)
    make_moe(tmp_path / "moe")
    for name, seed in (("calib.txt", 0), ("valid.txt", 1), ("wiki.txt", 2)):
        (tmp_path / name).write_text(sample_text(3000, seed), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_page_run(room: Path) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/api.md", "exec"), names)
    for function in FUNCTIONS:
        assert re.search(rf"^## .*`{function}`", page, re.MULTILINE), function
    assert (room / "out" / "packed" / "manifest.json").is_file()


def test_importing_the_package_loads_nothing_heavy() -> None:
    check = "sys.exit(bool({'torch', 'transformers', 'numpy', 'pydantic', 'click'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", f"import sys, crepe_deploy; {check}"], check=False).returncode == 0


def test_no_module_takes_the_place_of_a_public_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(crepe_deploy.__path__)} | {"exporting", "serve", "bench"}
    assert not modules & set(crepe_deploy.__all__)


def test_functions_stay_functions_whatever_is_imported_first() -> None:
    modules = [f"crepe_deploy.{name}" for name in ("searching.run", "exporting.pipeline", "api.search", "api.export")]
    code = f"import {', '.join(modules)}; assert all(callable(getattr(crepe_deploy, name)) for name in {FUNCTIONS})"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_not_there_is_an_attribute_error() -> None:
    assert not hasattr(crepe_deploy, "deploy")
    assert set(crepe_deploy.__all__) <= set(dir(crepe_deploy))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_and_options_have_the_same_names(function: str) -> None:
    command = cli.commands[{"evaluate": "eval"}.get(function, function.replace("_", "-"))]
    options = {parameter.name: parameter for parameter in command.params if parameter.name != "as_json"}
    parameters = inspect.signature(getattr(crepe_deploy, function)).parameters
    assert set(options) == set(parameters) - {"progress", "show", "say"}
    for name, option in options.items():
        default = parameters[name].default
        if isinstance(option, click.Argument) or option.required:
            assert default is inspect.Parameter.empty or name == "calib"
        elif name not in ("params", "calib", "kernels"):
            assert default == option.get_default(click.Context(command)), name


def test_every_function_is_typed_and_says_what_it_raises() -> None:
    for name in FUNCTIONS:
        function = getattr(crepe_deploy, name)
        assert function.__doc__ and all(
            parameter.annotation is not parameter.empty for parameter in inspect.signature(function).parameters.values()
        )
        assert name == "doctor" or "Raises" in function.__doc__ or "raised" in function.__doc__, name


def windows(calib: Any) -> CalibrationSet:
    return windows_of(find_model("model"), calib, "text", 4, 32, 0)


def test_calibration_is_a_source_documents_or_tokens(room: Path) -> None:
    from_file = windows("calib.txt")
    assert torch.equal(windows(Path("calib.txt")).tokens, from_file.tokens)
    assert torch.equal(windows([(room / "calib.txt").read_text()]).tokens, from_file.tokens)
    assert torch.equal(windows(from_file.tokens.to(torch.int32)).tokens, from_file.tokens)
    assert windows(from_file) is from_file
    assert [part["source"] for part in windows(crepe_deploy.Mixture(["calib.txt", "wiki.txt"])).parts] == [
        "calib.txt",
        "wiki.txt",
    ]


@pytest.mark.parametrize(
    ("calib", "error", "message"),
    [
        ([Path("calib.txt")], ConfigError, "Mixture"),
        ([" "], CalibrationError, "no text"),
        (torch.zeros(4, dtype=torch.long), CalibrationError, "shape"),
        (torch.zeros(4, 8), CalibrationError, "whole numbers"),
        (torch.full((4, 8), 320), CalibrationError, "from 0 to 319"),
    ],
)
def test_calibration_that_cannot_be_is_refused(room: Path, calib: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        windows(calib)


def test_a_pruning_of_tokens_records_what_was_given(room: Path) -> None:
    tokens = torch.arange(128).view(4, 32)
    manifest = crepe_deploy.prune("model", room / "pruned", sparsity=0.5, method="wanda", calib=tokens)
    assert manifest.calibration is not None and manifest.calibration["source"] == "tokens given"
    assert (manifest.calibration["samples"], manifest.calibration["length"]) == (4, 32)
