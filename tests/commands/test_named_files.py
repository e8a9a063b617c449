"""A file or folder that is not there is refused by the name of the option or argument that it was given by."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from crepe_deploy.cli import add_outer_commands, cli, run
from tests.commands.samples import enter_samples

NONE = "none.file"
FEW = "--calib-samples 2 --calib-length 16"
MISSING = {  # command and option or argument: the command line, X the missing file or folder
    "prune --calib": "prune model --out out --calib X.txt",
    "prune --preset": f"prune model --out out --method crepe --preset X.json --calib text.txt {FEW}",
    "prune --recipe": f"prune model --out out --recipe X.yaml --calib text.txt {FEW}",
    "prune-and-export --calib": "prune-and-export model --out out --calib text.txt --calib X.jsonl",
    "prune-and-export --preset": f"prune-and-export model --out out --preset X.json --calib text.txt {FEW}",
    "prune-and-export --recipe": f"prune-and-export model --out out --recipe X.yaml --calib text.txt {FEW}",
    "tyr --calib": "tyr model --out out --calib X.txt",
    "search --calib": "search model --out p.json --calib X.txt --text text.txt",
    "search --text": "search model --out p.json --calib text.txt --text X.txt",
    "heal --text": "heal pruned --out out --dense model --text X.txt",
    "experts --calib": "experts mixtral --out out --calib X.txt",
    "experts --scores": "experts mixtral --out out --scores X.safetensors",
    "eval --text": "eval model --text X.txt",
    "eval --task-dir": "eval model --tasks foo --task-dir X",
    "bench --text": "bench model --engine transformers --text X.txt",
    "bench --gate": "bench model --engine transformers --gate X.yaml",
    "bench --baseline": "bench model --engine transformers --baseline X",
    "bench CONFIG or MODEL": "bench X.yaml",
    "gate BASELINE": "gate X.json run.json --max-slowdown 0.1",
    "gate CANDIDATE": "gate run.json X.json --max-slowdown 0.1",
    "gate --budgets": "gate run.json run.json --budgets X.yaml",
    "report RUNS": "report X.json --out out",
    "verify FOLDER": "verify X",
    "heal FOLDER": "heal X --out out --dense model --text text.txt",
}
MODELS = {  # commands whose model is missing say so, with the option where there are two
    "heal --dense": "heal pruned --out out --dense X --text text.txt",
    "eval --against": "eval model --text text.txt --against X",
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the arguments name."""
    folder = tmp_path_factory.mktemp("samples")
    with pytest.MonkeyPatch.context() as patch:
        enter_samples(folder, patch)
    return folder


@pytest.mark.parametrize("where", [*MISSING, *MODELS])
def test_what_is_missing_is_named_with_its_option(
    samples: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    monkeypatch.chdir(samples)
    line = (MISSING | MODELS)[where].replace("X", NONE)
    (value,) = (word for word in line.split() if word.startswith(NONE))
    name = where.partition(" ")[2]
    assert run([*line.split(), "--json"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith((f"error: {name} {value}", f"error: {name} '{value}'")), err
    assert json.loads(out)["error"] == err.removeprefix("error: ").strip()


def test_every_option_that_takes_a_file_is_tried() -> None:
    add_outer_commands()
    taking = {
        f"{name} {max(option.opts, key=len)}"
        for name, command in cli.commands.items()
        for option in (
            command.commands["run"] if isinstance(command, click.Group) and name == "bench" else command
        ).params
        if isinstance(option, click.Option)
        and (isinstance(option.type, click.Path) or option.name in ("calib", "text", "preset", "recipe", "against"))
        and option.name not in ("out", "junit", "markdown")  # which are written
    }
    assert taking - set(MISSING) - set(MODELS) == set()
