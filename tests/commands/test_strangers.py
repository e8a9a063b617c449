"""Models from strangers, over every command that takes one: no code of theirs runs, nothing asks, nothing is odd."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest

from crepe_deploy.cli import run
from crepe_deploy.store.manifest import load_manifest, save_manifest, sha256_file
from crepe_deploy.store.stock import tokenizer_of
from tests.gguf_files import write_gguf
from tests.pico import make_pico_llama, sample_text

CANARY = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig as Code
class Canary(Code):
    pass
"""
AUTO = {
    "AutoConfig": "canary.Canary",
    "AutoTokenizer": ["canary.Canary", "canary.Canary"],
    "AutoModelForCausalLM": "canary.Canary",
    "AutoModel": "canary.Canary",
}
DRIVER = """
import json, sys
from crepe_deploy.cli import run
codes = {}
for arguments in json.load(open(sys.argv[1])):
    print("COMMAND", *arguments, file=sys.stderr)
    codes[" ".join(arguments)] = run(arguments)
json.dump(codes, open(sys.argv[2], "w"))
"""


def change(path: Path, **entries: Any) -> None:
    """Set entries of a JSON object in a file."""
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **entries}))


def hostile(folder: Path, marker: Path, kind: str) -> Path:
    """A pico model whose configuration, tokenizer or both name code of its own, in every file that may hold some."""
    make_pico_llama(folder)
    (folder / "canary.py").write_text(CANARY.format(marker=str(marker)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CANARY.format(marker=str(marker)))
    change(folder / "generation_config.json", custom_generate=str(folder))
    spoil(folder, kind)
    return folder


def spoil(folder: Path, kind: str) -> None:
    """Name that code in the way `kind`."""
    if kind in ("tokenizer", "both"):
        change(folder / "tokenizer_config.json", auto_map=AUTO, tokenizer_class="CanaryTokenizer")
    if kind in ("config", "both"):
        change(folder / "config.json", auto_map=AUTO)
    if kind == "unknown type":
        change(folder / "config.json", auto_map=AUTO, model_type="canary")
    if kind == "no causal class":
        change(folder / "config.json", auto_map=AUTO, model_type="vit")
    if kind == "tokenizer class in config":
        change(folder / "config.json", auto_map=AUTO, tokenizer_class="CanaryTokenizer")
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": AUTO}))
    if kind == "attention":
        change(folder / "config.json", _attn_implementation=f"{folder}", attn_implementation="stranger/kernel")


def signed(folder: Path) -> None:
    """Make the manifest say what is there."""
    manifest = load_manifest(folder)
    files = {path.name: sha256_file(path) for path in folder.iterdir() if path.name in manifest.files}
    save_manifest(folder, manifest.model_copy(update={"files": files}))


def commands(model: Path, text: Path, out: Path) -> list[list[str]]:
    """Every command that takes a model, as quick as it can be."""
    calibration = ["--calib", str(text), "--calib-samples", "2", "--calib-length", "32"]
    source = str(model)
    scenario = out / "scenario.yaml"
    point = {"prompt_tokens": 8, "output_tokens": 2}
    scenario.write_text(
        json.dumps(
            {
                "name": "strangers",
                "engine": "transformers",
                "candidates": [{"name": "a", "folder": source}],
                "points": [point],
                "rounds": 1,
                "warmup": 0,
                "quality": {"text": str(text), "window": 32, "max_tokens": 64},
            }
        )
    )
    return [
        ["plan", source],
        ["inspect", source],
        ["verify", source],
        ["prune", source, "--out", str(out / "prune"), *calibration],
        ["prune", source, "--out", str(out / "magnitude"), "--method", "magnitude"],
        ["prune-and-export", source, "--out", str(out / "both"), "--format", "dense,packed", *calibration],
        ["eval", source, "--text", str(text), "--window", "32", "--max-tokens", "64"],
        ["tyr", source, "--out", str(out / "tyr"), *calibration, "--sparsity", "0.25", "--generations", "1",
         "--offspring", "2", "--iterations", "1", "--ffn-multiple", "8", "--search-samples", "1"],
        ["search", source, "--out", str(out / "search.json"), *calibration, "--text", str(text),
         "--text-length", "32", "--text-samples", "1", "--evaluations", "1", "--fit", "3", "--finalists", "1"],
        *(["export", source, "--format", kind, "--out", str(out / kind)]
          for kind in ("dense", "packed", "int8", "onnx", "deci")),
        ["serve", source, "--port", "0", "--engine-does-not-exist"],
        ["bench", str(scenario), "--out", str(out / "bench.json")],
    ]  # fmt: skip


def answers(todo: list[list[str]], folder: Path) -> tuple[dict[str, int], str]:
    """Exit codes by command, and stderr, of commands in one process whose stdin says yes to whatever asks."""
    script, asked, told = (folder / name for name in ("driver.py", "asked.json", "told.json"))
    script.write_text(DRIVER)
    asked.write_text(json.dumps(todo))
    done = subprocess.run(
        [sys.executable, str(script), str(asked), str(told)], input="y\n" * 10_000, capture_output=True, text=True,
        timeout=3600, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert told.exists(), done.stderr[-4000:]
    return json.loads(told.read_text()), done.stderr + done.stdout


KINDS = ("tokenizer", "config", "no causal class")
MORE = ("both", "unknown type", "tokenizer class in config", "attention")


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.faults) for kind in MORE)])
def test_no_code_of_a_stranger_runs_and_nothing_asks(tmp_path: Path, kind: str) -> None:
    marker, out = tmp_path / "ran", tmp_path / "out"
    out.mkdir()
    text = tmp_path / "text.txt"
    text.write_text(sample_text(2000))
    model = hostile(tmp_path / "model", marker, kind)
    clean, pruned_folder = make_pico_llama(tmp_path / "clean"), tmp_path / "pruned"
    assert run(["prune", str(clean), "--out", str(pruned_folder), "--method", "magnitude"]) == 0
    spoil(pruned_folder, kind)
    signed(pruned_folder)
    pruned = commands(pruned_folder, text, out)
    for command in pruned:
        command[-1:] = [f"{command[-1]}-of-pruned"] if "export" in command else command[-1:]
    exports = [command for command in pruned if command[0] in ("export", "verify", "inspect")]
    codes, said = answers([*commands(model, text, out), *exports], tmp_path)
    assert not marker.exists()
    assert "unexpected" not in said and "Traceback" not in said, said
    assert "trust_remote_code" not in said and "[y/N]" not in said
    assert set(codes.values()) <= {0, 1, 2}, codes


ESCAPES = (
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    "{{ self.__init__.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{% if c.__name__ == 'Popen' %}{{ c(['touch', 'MARK']) }}"
    "{% endif %}{% endfor %}",
    "{% import 'canary.py' as x %}{% include '/etc/passwd' %}{{ namespace.__init__.__globals__ }}",
)


def hostile_gguf(place: Path, pico: Path, marker: Path, template: str) -> Path:
    """A GGUF file whose metadata name code in every way that a reader might believe."""

    def more(writer: Any) -> None:
        (place.parent / "canary.py").write_text(CANARY.format(marker=str(marker)))
        for key in ("auto_map", "general.auto_map", "tokenizer.auto_map", "llama.auto_map"):
            writer.add_string(key, json.dumps(AUTO))
        writer.add_string("general.source.url", f"file://{place.parent}/canary.py")
        writer.add_string("general.custom_code", CANARY.format(marker=str(marker)))
        writer.add_string("tokenizer.huggingface.json", json.dumps({"auto_map": AUTO, "tokenizer_class": "Canary"}))
        writer.add_string("tokenizer.chat_template.tool_use", template)
        writer.add_array("tokenizer.chat_templates", ["tool_use"])

    return write_gguf(place, pico, rope=more, template=template)


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.faults) for n in range(1, len(ESCAPES)))])
def test_no_code_that_a_gguf_file_names_runs(tmp_path: Path, number: int) -> None:
    marker, out, text = tmp_path / "ran", tmp_path / "out", tmp_path / "text.txt"
    out.mkdir()
    text.write_text(sample_text(2000))
    template = ESCAPES[number].replace("MARK", str(marker))
    model = hostile_gguf(tmp_path / "canary.gguf", make_pico_llama(tmp_path / "pico"), marker, template)
    codes, said = answers(
        [["eval", str(model), "--text", str(text), "--window", "32"], *commands(model, text, out)], tmp_path
    )
    assert not marker.exists()
    assert "unexpected" not in said and "Traceback" not in said, said
    assert "trust_remote_code" not in said and "[y/N]" not in said
    assert set(codes.values()) <= {0, 1, 2} and list(codes.values()).count(0) > 5, codes
    tokenizer = tokenizer_of(out / "magnitude")
    assert tokenizer.chat_template
    with pytest.raises((jinja2.exceptions.TemplateError, TypeError)):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert not marker.exists()
