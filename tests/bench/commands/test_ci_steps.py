"""The workflow's own `run:` steps in bash, in a repository of somebody's, as GitHub would run them.

Substituted: the step that installs (the network), whose form test_init_ci.py checks, and the comment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from crepe_deploy.bench.commands.init_ci import init_ci
from crepe_deploy.bench.run.result import load_run

from tests.pico import make_pico_llama

SCENARIO = """\
name: mine
engine: transformers
candidates: [{name: dense, folder: made/dense}, {name: same, folder: made/dense}]
points: [{name: p, prompt_tokens: 8, output_tokens: 4}]
rounds: 5
threads: 1
"""
BUDGETS = "relative: [{metric: tpot_s, max_slowdown: 20}]\nmemory: {weights: 0.0}\n"
PREPARE = 'mkdir -p made && cp -r model made/dense && echo "prepared $PWD" >> "$RUNNER_TEMP/prepared"'


def git(repository: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    return subprocess.run(command, cwd=repository, check=True, capture_output=True, text=True).stdout.strip()


def commit(repository: Path) -> str:
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", "x")
    return git(repository, "rev-parse", "HEAD")


def pull_request(repository: Path, base: str, temporary: Path) -> dict[str, str]:
    """Run the workflow of the checkout against `base`; what each step printed, by its name."""
    temporary.mkdir()
    job = yaml.safe_load((repository / ".github/workflows/crepe-deploy.yml").read_text())["jobs"]["gate"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    values = {**os.environ, **job["env"], "BASE": base, "RUNNER_TEMP": str(temporary), "PATH": path}
    printed = {}
    for step in (step for step in job["steps"] if "run" in step and step["name"] not in ("Install", "Comment")):
        done = subprocess.run(
            ["bash", "-e", "-c", step["run"]], cwd=repository, env=values, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (step["name"], done.stdout, done.stderr)
        printed[step["name"]] = done.stdout
    return printed


@pytest.mark.parametrize("scenario", ["ci/my bench.yaml"])
def test_the_request_that_adds_it_passes_and_the_next_is_compared(tmp_path: Path, scenario: str) -> None:
    repository = tmp_path / "repository"
    make_pico_llama(repository / "model")
    git(repository, "init", "-q")
    bare = commit(repository)
    (repository / "ci").mkdir()
    (repository / scenario).write_text(SCENARIO.replace("made/", "../made/"))
    (repository / "budgets.yaml").write_text(BUDGETS)
    (repository / ".gitignore").write_text("made/\n")
    init_ci(repository, Path(scenario), Path("budgets.yaml"), prepare=PREPARE)
    added = commit(repository)

    printed = pull_request(repository, bare, tmp_path / "first")
    assert "no base yet" in printed["Measure the base"]
    assert "no base yet, so nothing is gated" in printed["Gate"]
    gate = tmp_path / "first" / "gate"
    assert not (gate / "base.json").exists() and (gate / "head.json").is_file()
    assert "no base yet" in (gate / "comment.md").read_text()
    assert "memory:" in (gate / "suggested-budgets.yaml").read_text()

    git(repository, "worktree", "prune")
    (repository / "made" / "dense").rename(tmp_path / "made by the first")
    (repository / "notes.txt").write_text("a change\n")
    commit(repository)
    printed = pull_request(repository, added, tmp_path / "second")
    assert printed["Gate"].startswith("PASS: this commit against the last")
    gate = tmp_path / "second" / "gate"
    assert load_run(gate / "base.json").workload == load_run(gate / "head.json").workload
    assert (gate / "junit.xml").is_file() and (gate / "report" / "report.html").is_file()
    prepared = (tmp_path / "second" / "prepared").read_text().splitlines()
    assert prepared == [f"prepared {tmp_path / 'second' / 'base'}", f"prepared {repository}"]
