"""Shell completion: what a shell is offered, by the protocol that click's scripts speak, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from crepe_deploy.exporting.registry import EXPORTERS

from crepe_deploy.commands import completion
from crepe_deploy.model.decoder import COMPUTE_DTYPES
from crepe_deploy.pruning.methods import METHODS
from crepe_deploy.pruning.recipe import known_presets, known_recipes
from crepe_deploy.pruning.steps import KINDS

CODE = """
import sys
from crepe_deploy import cli
try:
    cli.run([])
finally:
    assert not {"torch", "transformers", "numpy", "pydantic"} & set(sys.modules)
"""


def offered(line: str) -> list[str]:
    """What bash would be told behind `line`."""
    words = line.split(" ")
    asked = {"_CREPE_DEPLOY_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("crepe-deploy prune-", ["plain,prune-and-export"]),
        ("crepe-deploy prune --meth", ["plain,--method"]),
        ("crepe-deploy prune --method ", [f"plain,{name}" for name in METHODS]),
        ("crepe-deploy prune --recipe be", ["plain,best", "file,be"]),
        ("crepe-deploy prune --preset p", ["plain,pho", "file,p"]),
        ("crepe-deploy prune --reprune dsnot-", ["plain,dsnot-ria"]),
        ("crepe-deploy prune-and-export m --format ", [f"plain,{name}" for name in EXPORTERS]),
        ("crepe-deploy prune-and-export m --format dense,pa", ["plain,dense,packed"]),
        ("crepe-deploy prune mod", ["file,mod"]),
        ("crepe-deploy prune m --calib s", ["plain,self", "file,s"]),
        ("crepe-deploy eval m --dtype b", ["plain,bfloat16"]),
    ],
)
def test_a_shell_is_offered(line: str, wanted: list[str]) -> None:
    assert offered(line) == wanted


def test_the_names_are_those_of_the_registries() -> None:
    assert tuple(METHODS) == completion.METHODS
    assert {kind: tuple(known) for kind, known in KINDS.items()} == completion.STEPS
    assert set(completion.DTYPES) == {"auto", *COMPUTE_DTYPES}
    for kind, known in (("recipes", known_recipes()), ("presets", known_presets())):
        items = completion.shipped(kind)(None, None, "")  # type: ignore[arg-type]
        assert [item.value for item in items if item.type == "plain"] == known


def test_the_script_for_bash_is_printed_as_documented() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "completion.md").read_text(encoding="utf-8")
    assert 'eval "$(_CREPE_DEPLOY_COMPLETE=bash_source crepe-deploy)"' in documented
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | {"_CREPE_DEPLOY_COMPLETE": "bash_source"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "_crepe_deploy_completion" in done.stdout
