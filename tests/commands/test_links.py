"""Links that lead nowhere or in a circle, as every input of every command: a message that names them, exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from crepe_deploy import cli
from crepe_deploy.cli import run
from tests.commands.samples import enter_samples

TEXT = ("--calib", "text.txt", "--calib-samples", "2", "--calib-length", "16")
SEARCH = ("--text", "text.txt", "--text-samples", "1", "--text-length", "16", "--out", "out.json")
# Every command with inputs, and the parts of its call that name them, by the parameter of each; the rest must do.
CALLS: dict[str, tuple[tuple[str, ...], dict[str, int | tuple[str, ...]]]] = {
    "prune": (("prune", "model", *TEXT, "--out", "out"),
              {"model": 1, "--calib": 3, "--preset": ("--preset",), "--recipe": ("--recipe",)}),
    "prune-and-export": (("prune-and-export", "model", *TEXT, "--out", "out"),
                         {"model": 1, "--calib": 3, "--preset": ("--preset",), "--recipe": ("--recipe",)}),
    "export": (("export", "pruned", "--format", "packed"), {"source": 1}),
    "search": (("search", "model", *TEXT, *SEARCH), {"model": 1, "--calib": 3, "--text": 9}),
    "tyr": (("tyr", "model", *TEXT, "--search-samples", "1", "--ffn-multiple", "8", "--out", "out"),
            {"model": 1, "--calib": 3}),
    "heal": (("heal", "pruned", "--dense", "model", "--text", "text.txt", "--steps", "1", "--window", "16",
              "--batch-tokens", "32", "--out", "out"), {"folder": 1, "--dense": 3, "--text": 5}),
    "experts": (("experts", "mixtral", "--remove", "1", *TEXT, "--out", "out"), {"model": 1, "--calib": 5}),
    "experts, measured before": (("experts", "mixtral", "--remove", "1", "--out", "out"), {"--scores": ("--scores",)}),
    "eval": (("eval", "model", "--text", "text.txt", "--window", "16"),
             {"model": 1, "--text": 3, "--against": ("--against",),
              "--task-dir": ("--tasks", "piqa", "--task-dir")}),
    "plan": (("plan", "model"), {"model": 1}),
    "inspect": (("inspect", "pruned"), {"folder": 1}),
    "verify": (("verify", "pruned"), {"folder": 1}),
    "serve": (("serve", "pruned"), {"model": 1}),
    "gate": (("gate", "run.json", "run.json", "--budgets", "budgets.yaml"),
             {"baseline": 1, "candidate": 2, "--budgets": 4}),
    "report": (("report", "run.json", "--out", "out"), {"runs": 1}),
    "bench run": (("bench", "run", "model", "--engine", "transformers", "--points", "1x8+2", "--out", "out.json"),
                  {"targets": 2, "--baseline": ("--baseline",), "--text": ("--text",),
                   "--gate": ("--gate",)}),
    "bench init-ci": (("bench", "init-ci", "suite.yaml", "--budgets", "budgets.yaml"),
                      {"scenario": 2, "--budgets": 4, "--root": ("--root",), "--from": ("--from",)}),
}  # fmt: skip
FILES = {"--preset", "--recipe", "--calib", "--text", "--dense", "--against", "--baseline", "--from"}  # else paths
OUTPUTS = {"--out", "--junit", "--markdown"}


def inputs(group: click.Group, name: str = "") -> Iterator[tuple[str, str]]:
    """Every parameter of every command that may name a file of a user's."""
    for command in group.commands.values():
        whole = f"{name} {command.name}".strip()
        if isinstance(command, click.Group):
            yield from inputs(command, whole)
            continue
        for parameter in command.params:
            option = parameter.opts[0]
            path = isinstance(parameter.type, click.Path) or isinstance(parameter, click.Argument)
            if option not in OUTPUTS and (path or option in FILES) and option != "vllm_options":
                yield whole, option


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Samples in the working folder, and links, some of them named as a hub id is."""
    enter_samples(tmp_path, monkeypatch)
    place = tmp_path / "links"
    place.mkdir()
    for name, target in {"self": "self", "a": "b", "b": "a", "far": "further", "further": "a", "dangling": "nowhere",
                         "text.txt": "nowhere", "loop.yaml": "loop.yaml", "model.gguf": "model.gguf",
                         "run.json": "b"}.items():  # fmt: skip
        (place / name).symlink_to(target)
    names = ("self", "a", "far", "self/below", "text.txt", "model.gguf")
    return [*(f"links/{name}" for name in names), str(place / "dangling")]


def test_every_input_of_every_command_is_tried() -> None:
    cli.add_outer_commands()
    tried = {(name.partition(",")[0], parameter) for name, (_, places) in CALLS.items() for parameter in places}
    assert set(inputs(cli.cli)) == tried


@pytest.mark.parametrize(("name", "parameter"), [(name, one) for name, (_, places) in CALLS.items() for one in places])
def test_a_link_that_leads_nowhere_is_refused_by_name(
    links: list[str], capsys: pytest.CaptureFixture[str], name: str, parameter: str
) -> None:
    call, places = CALLS[name]
    place = places[parameter]
    before = sorted(Path().rglob("*"))
    for link in links:
        argv = [*call, *place, link] if isinstance(place, tuple) else [*call[:place], link, *call[place + 1 :]]
        capsys.readouterr()
        code, said = run(argv), capsys.readouterr().err
        assert code == 2 and "unexpected" not in said, (argv, code, said)
        assert link.rpartition("/")[2] in said, (argv, said)
        assert "the hub" not in said or link.startswith("/"), (argv, said)
    assert sorted(Path().rglob("*")) == before
