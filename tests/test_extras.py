"""One table says which extra brings a package, and one helper says that it is missing."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from crepe_deploy.errors import MissingExtra
from crepe_deploy.extras import EXTRAS, require
from tests.test_project import MODULES

ROOT = Path(__file__).resolve().parent.parent


def test_every_package_is_in_the_extra_that_is_named() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.values():
        assert package in {re.split(r"[><=;\s]", line)[0] for line in extras[extra]}, package


def test_nothing_else_words_the_refusal() -> None:
    raising = {module for module, path in MODULES.items() if "MissingExtra(" in path.read_text(encoding="utf-8")}
    assert raising == {"crepe_deploy.errors", "crepe_deploy.extras"}


def test_the_refusal_names_all_that_is_missing_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as caught:
        require("the report", "jinja2", "matplotlib")
    said = "the report needs jinja2 and matplotlib, which are not installed: pip install 'crepe-deploy[bench]'"
    assert str(caught.value) == said
