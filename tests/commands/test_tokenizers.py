"""Tokenizers that are missing, damaged or do not fit: said before any work where they matter, and never passed on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, Qwen2Config

from crepe_deploy.cli import run
from tests.pico import make_pico, make_pico_llama, sample_text

Said = Callable[[], str]
MAGNITUDE = ("--method", "magnitude")


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    capsys.readouterr()
    return lambda: capsys.readouterr().err


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sample_text(2000))
    return path


def truncate(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:2000])


def beyond(model: Path) -> None:
    """The tokenizer puts a token in front of every text for which the embedding has no row."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["of"])
    tokenizer.save_pretrained(model)


def qwen2(folder: Path) -> Path:
    """A model of a family whose tokenizer's class can be built of nothing, without a tokenizer."""
    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=1)
    for path in make_pico(folder, config).glob("tokenizer*"):
        path.unlink()
    return folder


def with_text(model: Path, text: Path, out: Path) -> list[list[str]]:
    """The commands that tokenise."""
    calibration = ["--calib", str(text), "--calib-samples", "4", "--calib-length", "32"]
    return [
        ["prune", str(model), "--out", str(out), *calibration],
        ["eval", str(model), "--text", str(text), "--window", "32"],
        ["tyr", str(model), "--out", str(out), *calibration],
        ["search", str(model), "--out", f"{out}.json", *calibration, "--text", str(text)],
    ]


def without_text(model: Path, out: Path) -> list[list[str]]:
    """The commands that tokenise nothing, or a fixed prompt."""
    return [
        ["prune", str(model), "--out", str(out), *MAGNITUDE],
        ["prune-and-export", str(model), "--out", str(out), "--format", "packed", *MAGNITUDE],
        ["export", str(model), "--format", "int8", "--out", str(out)],
    ]


def test_without_a_tokenizer_text_is_refused_and_the_rest_works(tmp_path: Path, text: Path, said: Said) -> None:
    model, out = qwen2(tmp_path / "m"), tmp_path / "out"
    for command in with_text(model, text, out):
        assert run(command) == 2
        assert f"error: MODEL {model} has no tokenizer" in said() and not out.exists()
    for number, command in enumerate(without_text(model, out)):
        assert run([part.replace(str(out), f"{out}{number}") for part in command]) == 0, said()
    assert run(["verify", f"{out}1/packed"]) == 0
    greedy = json.loads(Path(f"{out}1/packed/manifest.json").read_text())["metrics"]["greedy"]
    assert greedy["prompt"] is None and greedy["prompt_token_ids"] == [2, 3, 4, 5, 6]


REFUSED = {
    truncate: "no tokenizer that transformers can load",
    beyond: "of 321 tokens, gives id 320 ('of'), and the model's embedding has 320 rows",
}


@pytest.mark.parametrize("spoil", REFUSED)
def test_a_tokenizer_that_does_not_work_is_refused_before_any_work_and_never_shipped(
    tmp_path: Path, text: Path, said: Said, spoil: Callable[[Path], None]
) -> None:
    model, out = make_pico_llama(tmp_path / "m"), tmp_path / "out"
    spoil(model)
    for command in [*with_text(model, text, out), *without_text(model, out)]:
        assert run(command) == 2, command
        shown = said()
        assert REFUSED[spoil] in shown and str(model) in shown, (command, shown)
        assert not out.exists()


def test_a_damaged_tokenizer_is_said_by_verify_inspect_and_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crepe_deploy.store.manifest import load_manifest, save_manifest, sha256_file

    out = tmp_path / "out"
    assert run(["prune", str(make_pico_llama(tmp_path / "m")), "--out", str(out), *MAGNITUDE]) == 0
    truncate(out)
    manifest = load_manifest(out)
    files = {**manifest.files, "tokenizer.json": sha256_file(out / "tokenizer.json")}
    save_manifest(out, manifest.model_copy(update={"files": files}))
    for command in (
        ["verify", str(out)],
        ["export", str(out), "--format", "packed", "--out", str(tmp_path / "packed")],
    ):
        capsys.readouterr()
        assert run(command) == 2
        assert "no tokenizer that transformers can load" in capsys.readouterr().err
    assert run(["inspect", str(out), "--json"]) == 0
    assert "no tokenizer that transformers can load" in json.loads(capsys.readouterr().out)["damage"]
