"""The rooms of bench/: which may import which, and that whatever the docs and the results name is there."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
# a room, and the rooms and modules of bench/ that it may import
MAY_IMPORT = {
    "run": set(),
    "gate": {"run"},
    "report": {"run"},
    "gpu": set(),
    "benchmark": {"run", "gate"},
    "assets": set(),
    "demo_shown": {"report"},
    "demo": {"run", "assets", "demo_shown"},
    "commands": {"run", "gate", "report", "benchmark"},
}
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "Makefile", ROOT / ".ci" / "run",
    *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.yaml"), *BENCH.glob("results/*.json"), *BENCH.rglob("*.py"),
]  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """The absolute names that a file of bench/ imports, wherever in it."""
    package = ["crepe_deploy", "bench", *path.relative_to(BENCH).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def files_of(room: str) -> list[Path]:
    return [BENCH / f"{room}.py"] if (BENCH / f"{room}.py").is_file() else sorted((BENCH / room).rglob("*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    for path in files_of(room):
        for name in imports(path):
            if name.startswith("crepe_deploy.bench."):
                assert name.split(".")[2] in MAY_IMPORT[room] | {room}, f"{path.relative_to(ROOT)} imports {name}"


def test_every_room_has_its_rule_and_says_what_lives_there() -> None:
    rooms = {path.parent.name for path in BENCH.glob("*/__init__.py")} | {path.stem for path in BENCH.glob("[a-z]*.py")}
    assert rooms == {*MAY_IMPORT, "studies"}
    for path in BENCH.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


def test_nothing_that_a_user_runs_imports_a_study() -> None:
    for folder in ("crepe_deploy", "serve", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "bench.studies" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_module_that_is_to_be_run_is_there(page: Path) -> None:
    for name in re.findall(r"python -m (crepe_deploy(?:\.\w+)*)", page.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(name) is not None, name


@pytest.mark.parametrize("page", [*ROOT.glob("docs/*.md"), ROOT / "README.md"], ids=lambda page: page.stem)
def test_every_file_of_the_benches_that_a_page_names_is_there(page: Path) -> None:
    for name in re.findall(r"(?<![\w/.])bench/[\w/]+\.(?:py|json|md)", page.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file() or name == "bench/results/gpu.json", name
