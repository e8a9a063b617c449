"""The project's address is in one place, and code finds it through the metadata of what is installed."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from crepe_deploy import project

ROOT = Path(__file__).resolve().parent.parent


def test_every_label_of_pyproject_is_found() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert {"Repository", "Documentation", "Issues", "Changelog"} <= set(urls)
    assert {label: project.project_url(label) for label in urls} == urls


def test_no_source_repeats_it() -> None:
    address = project.project_url("Repository").removeprefix("https://")
    command = ["git", "grep", "-lF", address, "--", "*.py", "*.yml", "*.json", "*.toml", "Makefile"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert set(found.stdout.split()) <= {"pyproject.toml"}


@pytest.mark.parametrize(
    ("recorded", "wanted"),
    [
        (None, "git+{repository}@v{version}"),
        ({"url": "file:///x.whl", "archive_info": {}}, "git+{repository}@v{version}"),
        ({"url": "https://h/a.git", "vcs_info": {"vcs": "git", "commit_id": "c0"}}, "git+https://h/a.git@c0"),
    ],
)
def test_what_pip_recorded_is_what_pip_is_given(
    recorded: dict[str, object] | None, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recorded is not None:
        (tmp_path / "direct_url.json").write_text(json.dumps(recorded))
    place = importlib.metadata.Distribution.at(tmp_path)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: place)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert project.install_address() == wanted.format(repository=project.project_url("Repository"), version=version)
