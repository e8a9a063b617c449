"""The rules that keep the project small and its parts apart, measured rather than remembered."""

from __future__ import annotations

import ast
import re
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
HEAVY = {"torch", "transformers", "numpy", "pydantic", "scipy"}
SOURCES = sorted(path for folder in FOLDERS.values() for path in folder.rglob("*.py"))


# The modules that put the program together from everything below; nothing imports them.
ASSEMBLING = {"crepe_deploy", "crepe_deploy.__main__", "crepe_deploy.cli"}
MODULES = {
    ".".join([top, *path.relative_to(folder).with_suffix("").parts]).removesuffix(".__init__"): path
    for top, folder in FOLDERS.items()
    for path in folder.rglob("*.py")
}


def folder_of(module: str) -> str:
    """The package that a module lies in; a package's `__init__` lies in itself."""
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


def room_of(module: str) -> str:
    """A folder, or a module directly in `crepe_deploy`: errors, pattern and the like are rooms of their own."""
    return module if folder_of(module) == "crepe_deploy" else folder_of(module)


def imported(module: str) -> Iterator[tuple[str, bool]]:
    """(absolute name, whether when the module is imported) of everything that a module of ours imports."""
    package = folder_of(module).split(".")
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{name}.{alias.name}", node in tree.body) for alias in node.names)


def modules_imported(module: str) -> Iterator[tuple[str, bool]]:
    """(module of ours, whether when the module is imported)."""
    for name, at_once in imported(module):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name:
            yield name, at_once


def is_outer(module: str) -> bool:
    """Whether a module lies in the folder export, serve or bench."""
    return module.split(".")[1:2] != [] and module.split(".")[1] in OUTER


def test_the_core_imports_the_outer_folders_in_commands_and_the_api_only() -> None:
    for module in MODULES:
        if is_outer(module):
            continue
        for other, at_once in modules_imported(module):
            allowed = module == "crepe_deploy.cli" or module.startswith(("crepe_deploy.api.", "crepe_deploy.commands."))
            assert not is_outer(other) or (allowed and not at_once), f"{module} imports {other}"


def test_the_command_line_imports_nothing_heavy_at_once() -> None:
    for module in MODULES:
        if module in ASSEMBLING or ".commands" in module or module.endswith("serve.command"):
            heavy = [name for name, at_once in imported(module) if at_once and name.split(".")[0] in HEAVY]
            assert heavy == [], module


def test_no_two_folders_import_each_other() -> None:
    edges = {
        (room_of(module), room_of(other))
        for module in MODULES
        if module not in ASSEMBLING
        for other, _ in modules_imported(module)
        if room_of(module) != room_of(other)
    }
    mutual = {frozenset(edge) for edge in edges if edge[::-1] in edges}
    assert not mutual


def test_every_folder_says_what_lives_there_and_what_may_come_in() -> None:
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert len(re.findall(r"[.;:](?=\s|$)", text)) >= 2, f"{module} has no docstring of two sentences"


def test_exit_codes_stand_in_one_place() -> None:
    for module, path in MODULES.items():
        if module != "crepe_deploy.errors":
            assert not re.search(r"^\s*(EXIT_\w+|exit_code)\b.*= *\d+", path.read_text(encoding="utf-8"), re.M), module


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = {
        ".".join([top, *path.parent.relative_to(folder).parts])
        for top, folder in FOLDERS.items()
        for path in folder.rglob("__init__.py")
    }
    assert listed == present


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


DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
TOPS = ("crepe_deploy", "export", "serve", "bench", "tests", "configs", "docs")


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_docs_name_what_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in re.findall(rf"(?<![\w/.:-])((?:{'|'.join(TOPS)})/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for command in re.findall(r"-m (crepe_deploy[\w.]*\w)", text):
        assert command in MODULES, f"{page.name} names {command}"


def test_rooms_import_only_what_stands_above_them_on_the_map() -> None:
    rows = re.findall(r"^\| `.*?/`.*? \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    folders = [folder for row in rows for folder in re.findall(r"`([\w/]+)/`", row) if folder != "tests"]
    inside = {folder: name for name, folder in OUTER.items()}
    order = [f"crepe_deploy.{inside.get(folder, folder.removeprefix('crepe_deploy/'))}" for folder in folders]
    rooms = {module: ".".join(folder_of(module).split(".")[:2]) for module in MODULES}
    assert set(order) == set(rooms.values()) - {"crepe_deploy"}
    for module in MODULES:
        for other, _ in modules_imported(module):
            if rooms[module] in order and rooms[other] in order:
                assert order.index(rooms[other]) <= order.index(rooms[module]), f"{module} imports {other}"


def test_the_map_names_files_of_its_rooms() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room, inside in re.findall(r"^\| `([\w/]+)/(?:\*\.py)?` \| (.*) \|$", text, re.MULTILINE):
        for name in re.findall(r"`([\w/]+(?:\.py|\.cpp|/))`", inside):
            assert (ROOT / room / name).exists(), f"{room} has no {name}"


def test_results_name_no_place_of_the_machine_that_made_them() -> None:
    for path in (ROOT / "bench" / "results").glob("*.json"):
        places = re.findall(r"[\"\s](/(?:home|root|work|tmp|dev/shm|Users)/[^\"\s]*)", path.read_text(encoding="utf-8"))
        assert not places, (path.name, places[:3])


def test_no_pickle_and_no_remote_code() -> None:
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text, path
        assert "trust_remote_code=True" not in text, path
        if "studies" not in path.parts and path.name not in {"stock.py", "architecture.py", "gguf.py", "usage.py"}:
            assert not re.search(r"Auto\w+\.from_\w+\(", text), f"{path} passes the one way into transformers by"


def test_every_error_has_a_documented_exit_code() -> None:
    from crepe_deploy import errors

    tree = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.CrepeError)
    ]
    assert {error.exit_code for error in tree} == {1, 2, 3, 4, 75}
    for error in tree:
        assert error.__name__ in (errors.__doc__ or "")


# Who reads without `store.reading`: what we wrote ourselves a moment ago, what the system or the package holds.
READERS = {
    r"json\.loads?\(": {
        "store.reading", "store.folders",  # the boundary; a claim, of which anything unreadable means nothing
        "bench.run.child", "bench.run.processes", "bench.run.worker", "bench.demo", "bench.studies.packed_parity",
        "bench.gpu.command", "bench.studies.ci_gate",  # our own workers' pipes and results
        "project",  # what pip recorded
        "serve.smoke", "serve.load", "serve.onnx_server",  # bodies of HTTP, bounded there
    },
    r"yaml\.(?!safe_dump)\w+\(": {"store.reading"},
    r"AutoTokenizer\.": {"store.stock", "store.gguf", "exporting.frame.usage"},  # and what a card tells its reader
    r"AutoConfig\.": {"store.gguf"},
    r"\.read_(?:text|bytes)\(": {
        "project",  # what pip recorded
        "machine", "packed.dispatch", "packed.cuda.dispatch", "packed.native",  # /proc; our own sources
        "store.folders", "bench.assets", "bench.commands.init_ci", "bench.gpu.command", "bench.gpu.table",
        "bench.report.page", "bench.run.child", "bench.run.environment", "bench.run.served_worker", "bench.run.worker",
        "bench.studies.ci_gate", "serve.keeper", "serve.launcher", "serve.load",  # /proc, our templates and logs
    },
    r"parquet\.": {"documents"},
}  # fmt: skip


@pytest.mark.parametrize("pattern", READERS)
def test_files_that_others_wrote_come_in_through_one_boundary(pattern: str) -> None:
    found = {
        module.removeprefix("crepe_deploy.")
        for module, path in MODULES.items()
        if any(re.search(pattern, line.partition("#")[0]) for line in path.read_text(encoding="utf-8").splitlines())
    }
    assert found <= READERS[pattern]
