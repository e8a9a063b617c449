"""The rules that keep the project small and its parts apart, measured rather than remembered."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTER = {"exporting": "export", "serve": "serve", "bench": "bench"}  # the name inside the package: the folder
FOLDERS = {"crepe_deploy": ROOT / "crepe_deploy"} | {
    f"crepe_deploy.{name}": ROOT / folder for name, folder in OUTER.items()
}
SOURCES = sorted(path for folder in FOLDERS.values() for path in folder.rglob("*.py"))


def imported(path: Path, top: str) -> Iterator[tuple[str, ast.AST]]:
    """Absolute names imported anywhere in a file of the package that starts with `top`."""
    relative = path.relative_to(FOLDERS[top]).parent.parts
    package = [*top.split("."), *relative]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node) for alias in node.names)


def test_the_core_knows_nothing_of_export_serve_and_bench() -> None:
    for path in sorted((ROOT / "crepe_deploy").rglob("*.py")):
        for name, _ in imported(path, "crepe_deploy"):
            outward = name.startswith(tuple(f"crepe_deploy.{outer}" for outer in OUTER))
            assert not outward or path.name == "cli.py", f"{path} imports {name}"


def test_the_command_line_imports_the_outer_parts_inside_functions_only() -> None:
    tree = ast.parse((ROOT / "crepe_deploy" / "cli.py").read_text(encoding="utf-8"))
    heavy = {*OUTER, "torch", "transformers"}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in heavy


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join([top, *path.parent.relative_to(folder).parts])
        for top, folder in FOLDERS.items()
        for path in folder.rglob("__init__.py")
    }
    assert listed == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        return archive.namelist()


def test_the_wheel_holds_one_package_and_its_data(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"crepe_deploy"}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            assert f"{package.replace('.', '/')}/{path.relative_to(folder).as_posix()}" in wheel
    assert "crepe_deploy/py.typed" in wheel
    assert "crepe_deploy/pruning/presets/default.json" in wheel
    for source in (ROOT / "crepe_deploy" / "packed" / "cpu").iterdir():
        assert f"crepe_deploy/packed/cpu/{source.name}" in wheel


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def test_files_and_functions_stay_small() -> None:
    long_files = {path.name: lines for path in SOURCES if (lines := len(path.read_text().splitlines())) > 350}
    assert long_files == {}
    long_functions = {
        f"{path.name}:{node.name}": length
        for path, node in functions()
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > 60
    }
    assert long_functions == {}


def test_public_functions_say_what_they_do() -> None:
    silent = [
        f"{path.name}:{node.name}"
        for path, node in functions()
        if not node.name.startswith("_") and node.col_offset == 0 and ast.get_docstring(node) is None
    ]
    assert silent == []


def test_no_pickle_and_no_remote_code() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text, path
        assert "trust_remote_code=True" not in text, path


def test_every_error_has_a_documented_exit_code() -> None:
    from crepe_deploy import errors

    tree = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.CrepeError)
    ]
    assert {error.exit_code for error in tree} == {1, 2, 3, 4}
    for error in tree:
        assert error.__name__ in (errors.__doc__ or "")
