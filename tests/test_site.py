"""The docs site builds strictly and needs no network; its tutorial, its notebook and README's commands run or parse."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crepe_deploy import errors
from crepe_deploy.cli import add_outer_commands, cli, run
from tests.pico import make_pico_llama, sample_text

ROOT = Path(__file__).resolve().parent.parent
add_outer_commands()

# What the tests put in the place of what the pages say: a tiny model, its texts, its budgets of work. In this order.
SUBSTITUTIONS = {
    "hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir model": "",  # the tiny model lies there
    "model --target cpu --out small": "model --target cpu --calib-samples 8 --calib-length 64 --out small",
    "--window 512 --max-tokens 8192": "--window 64 --max-tokens 1024",
    "--minutes 10": "--steps 10 --learning-rate 0.001 --batch-tokens 256 --window 64",
    "--points 1x64+33 --rounds 7": "--points 1x16+4 --rounds 2 --threads 1",
    "--text test.txt --max-tokens 8192 --out run.json": "--text test.txt --window 64 --max-tokens 1024 --out run.json",
    "steps=50": "steps=10, learning_rate=1e-3, batch_tokens=256, window=64",
    '"calib_samples": 64, "calib_length": 512': '"calib_samples": 8, "calib_length": 64',
    "window=512, max_tokens=8192": "window=64, max_tokens=1024",
    "crepe-deploy serve healed-packed --port 8000": "",  # tests/serve starts servers
}


def substituted(text: str) -> str:
    """A page's code as the tests run it."""
    for said, run_here in SUBSTITUTIONS.items():
        text = text.replace(said, run_here)
    return text


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page, in their order."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the model and the two texts that the pages begin by fetching."""
    make_pico_llama(tmp_path / "model", torch.bfloat16)
    for name, seed in (("train.txt", 0), ("test.txt", 1)):
        (tmp_path / name).write_text(sample_text(6000, seed), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorial_runs(room: Path) -> None:
    (budgets,) = blocks("docs/tutorial.md", "yaml")
    (room / "budgets.yaml").write_text(budgets, encoding="utf-8")
    ran = []
    for line in "".join(blocks("docs/tutorial.md", "bash")).splitlines():
        if here := substituted(line).strip():
            program, *arguments = shlex.split(here)
            assert program == "crepe-deploy"
            # Two rounds of a tiny model may leave a gate undecided; that it judges is what matters here.
            allowed = {0, errors.GateFailed.exit_code, errors.GateInconclusive.exit_code} if "gate" in here else {0}
            assert run(arguments) in allowed, here
            ran.append(arguments[0])
    assert ran == ["plan", "prune-and-export", "inspect", "verify", "eval", "heal", "export", "bench", "report", "gate"]
    assert (room / "report" / "report.html").is_file()


def test_the_notebook_runs(room: Path) -> None:
    cells = json.loads((ROOT / "docs" / "notebooks" / "first.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile(substituted("".join(cell["source"])), "first.ipynb", "exec"), names)
    assert names["packed"].metrics["size"]["weight_bytes_over_dense"] < 1


PAGES = ["README.md", *(f"docs/{name}" for name in ("install.md", "how-to.md", "tutorial.md", "heal.md"))]
LINES = [
    (page, line.strip())
    for page in PAGES
    for block in blocks(page, "(?:bash)?")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip().startswith("crepe-deploy ")
]


@pytest.mark.parametrize(("page", "line"), LINES)
def test_commands_of_the_pages_parse(page: str, line: str) -> None:
    arguments = shlex.split(line.removeprefix("$ "), comments=True)[1:]
    context = cli.make_context("crepe-deploy", list(arguments))
    name, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None and name is not None
    command.make_context(name, list(rest), parent=context)


def test_every_substitution_is_of_something_that_the_pages_say() -> None:
    text = (ROOT / "docs/tutorial.md").read_text() + (ROOT / "docs/notebooks/first.ipynb").read_text().replace(
        '\\"', '"'
    )
    assert [said for said in SUBSTITUTIONS if said not in text] == []


def test_the_site_builds_strictly_and_reads_without_a_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"?(https?:[^\">\s]*)", html)
        fetched += re.findall(r"<link[^>]*href=\"?(https?:[^\">\s]*)", html)
        assert fetched == [], page.name
    assert "CheckpointError" in (tmp_path / "site" / "troubleshooting.html").read_text(encoding="utf-8")
    assert "--calib-samples" in (tmp_path / "site" / "commands.html").read_text(encoding="utf-8")
