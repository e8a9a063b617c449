"""What is chosen where a person leaves it out: one rule, as a table; and what is given is what it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from crepe_deploy.api.choices import Given, Machine, Shape, choose, filled, line, machine_of, shape_of
from crepe_deploy.api.inputs import pattern_of
from crepe_deploy.cli import run
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.pruning.recipe import Recipe
from crepe_deploy.store.manifest import load_manifest
from tests.pico import make_pico, make_pico_llama, sample_text

CPU, GPU = Machine(gpu=False, vllm=True, onnx=True), Machine(gpu=True, vllm=True, onnx=True)
WIDE = Shape(frozenset({64, 96}), frozenset({64, 96}), frozenset(Recipe.model_fields), onnx=True)
NARROW = replace(WIDE, widths=frozenset({64, 104}), packable=frozenset({64, 104}))
ODD = replace(WIDE, widths=frozenset({63}), packable=frozenset({63}))
TRANSPOSED = replace(WIDE, packable=frozenset())
UNKNOWN = replace(WIDE, steps=WIDE.steps - {"permute", "rescale"}, onnx=False)
OWN = {"calib": "self", "calib_samples": 64, "calib_length": 512}
ALL = {"target": "cpu", "recipe": "best", "sparsity": "16:32", **OWN, "format": "dense,packed"}
ON_GPU = {**ALL, "target": "gpu", "sparsity": "2:4"}
STEPS = {"method": "ria", "params": {"exponent": 0.5}, "feed": "both", "reconstruct": "admm"}


def without(chosen: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in chosen.items() if name not in names}


@pytest.mark.parametrize(
    ("given", "machine", "model", "chosen"),
    [
        (Given(), CPU, WIDE, ALL),
        (Given(), GPU, WIDE, ON_GPU),
        (Given("cpu"), GPU, WIDE, ALL),
        (Given("gpu"), CPU, WIDE, ON_GPU),
        (Given("auto"), GPU, WIDE, ON_GPU),
        (Given(), CPU, NARROW, ALL | {"sparsity": "4:8"}),
        (Given(), CPU, ODD, ALL | {"sparsity": "2:4", "format": "dense"}),
        (Given(), CPU, TRANSPOSED, ALL | {"format": "dense"}),
        (Given(), CPU, UNKNOWN, {"target": "cpu", **STEPS} | without(ALL, "recipe")),
        (Given(), Machine(gpu=False, vllm=False, onnx=True), WIDE, ALL | {"format": "dense,packed,onnx"}),
        (Given(), Machine(gpu=False, vllm=False, onnx=True), UNKNOWN, STEPS | without(ALL, "recipe")),
        (Given(), Machine(gpu=False, vllm=False, onnx=False), WIDE, ALL),
        (Given(exports=False), CPU, WIDE, without(ALL, "format")),
        # each that is given is left alone, and the others are chosen all the same
        (Given(sparsity="2:4"), CPU, WIDE, without(ALL, "sparsity")),
        (Given(sparsity=0.5, granularity="matrix"), CPU, WIDE, without(ALL, "sparsity") | {"format": "dense"}),
        (Given(calib=True), CPU, WIDE, without(ALL, *OWN)),
        (Given(calib_samples=8), CPU, WIDE, without(ALL, "calib_samples")),
        (Given(format="packed"), CPU, WIDE, without(ALL, "format")),
        (Given(recipe=True), CPU, WIDE, without(ALL, "recipe")),
        (Given(recipe=True, needs_text=False), CPU, WIDE, without(ALL, "recipe", *OWN)),
        # pattern, text and formats given: nothing is chosen, but for a target
        (Given(None, "2:4", calib=True, format="dense"), CPU, WIDE, {}),
        (Given(None, "2:4", calib=True, exports=False), CPU, WIDE, {}),
        (Given("cpu", "2:4", calib=True, format="dense"), CPU, WIDE, {"target": "cpu", "recipe": "best"}),
        # who names a method is taken at their word, but for a target; only text is chosen where it is missing
        (Given(named=True, calib=True), CPU, WIDE, {}),
        (Given(named=True, needs_text=False), CPU, WIDE, {}),
        (Given(named=True), CPU, WIDE, {"target": "cpu", **OWN}),
        (Given("cpu", named=True), CPU, WIDE, without(ALL, "recipe")),
        (Given("gpu", named=True, calib=True), CPU, WIDE, without(ON_GPU, "recipe", *OWN)),
    ],
)
def test_what_is_chosen(given: Given, machine: Machine, model: Shape, chosen: dict[str, Any]) -> None:
    expected = {"target": "cpu", **chosen} if chosen else {}
    assert choose(given, machine, model) == expected
    if given.settled:
        assert not chosen
    options = filled(given.options, chosen)
    assert options["sparsity"] == (given.sparsity or chosen.get("sparsity", "2:4"))
    assert options["calib_samples"] == (given.calib_samples or chosen.get("calib_samples", 128))
    assert options["format"] == (given.format or chosen.get("format", "dense"))
    pattern_of(options["sparsity"], given.granularity)


def test_one_line_says_what_was_chosen_and_how_to_choose_otherwise() -> None:
    said = line(Given(), ALL, CPU)
    assert "\n" not in said
    assert (
        "--recipe best --sparsity 16:32 --calib self --calib-samples 64 --calib-length 512 --format dense,packed"
        in said
    )
    assert "--target gpu" in said and "--calib FILE" in said and "install" not in said
    assert "--param exponent=0.5" in line(Given(), STEPS | ALL, CPU)
    assert "docs/install.md" in line(Given(), ALL, Machine(gpu=False, vllm=False, onnx=False))
    assert "--calib FILE" not in line(Given(calib=True), without(ALL, *OWN), CPU)


def test_what_a_named_method_leaves_as_always_is_said_with_what_would_be_chosen(
    tmp_path: Path, pico: Path, calib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--method", "wanda", "--calib", calib, "--calib-length", 32)
    assert crepe("prune-and-export", pico, "--out", tmp_path / "out", *given) == 0
    (said,) = (text for text in capsys.readouterr().err.splitlines() if text.startswith("not given, so as always: "))
    assert "--sparsity 2:4 --format dense --calib-samples 128;" in said and "--calib-length" not in said
    if not torch.cuda.is_available():
        assert "--target auto chooses for this machine: --sparsity 16:32 --format dense,packed" in said
    assert crepe("prune", pico, "--out", tmp_path / "all", *given, "--calib-samples", 8, "--sparsity", "2:4") == 0
    assert "as always" not in capsys.readouterr().err


def test_a_model_as_the_choices_see_it(tmp_path: Path) -> None:
    llama = shape_of(Decoder(make_pico_llama(tmp_path / "llama", intermediate_size=96)))
    assert llama.widths == llama.packable == {64, 96} and llama.onnx and "permute" in llama.steps
    config = transformers.GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    gpt2 = shape_of(Decoder(make_pico(tmp_path / "gpt2", config)))
    assert gpt2.widths == {64, 256} and not gpt2.packable and not gpt2.onnx
    assert machine_of().gpu == torch.cuda.is_available()


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("pico") / "model", torch.bfloat16)


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(sample_text(3000), encoding="utf-8")
    return path


def crepe(*arguments: Any) -> int:
    return run([str(argument) for argument in arguments])


def test_nothing_given_is_said_recorded_and_written(
    tmp_path: Path, pico: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out, size = tmp_path / "out", ("--calib-samples", 8, "--calib-length", 32)
    assert crepe("plan", pico, *size, "--json") == 0
    plan = capsys.readouterr()
    assert crepe("prune-and-export", pico, "--out", out, *size, "--json") == 0
    written = capsys.readouterr()
    (said,) = (text for text in written.err.splitlines() if text.startswith("chosen for a "))
    assert said in plan.err.splitlines()
    report = json.loads(written.out)
    assert report["chosen"] == json.loads(plan.out)["chosen"] == json.loads((out / "report.json").read_text())["chosen"]
    assert report["chosen"]["recipe"] == report["recipe"] == "best"
    assert report["calibration"]["source"] == "self"
    assert report["pattern"] == report["chosen"]["sparsity"] == json.loads(plan.out)["pattern"]
    assert ",".join(report["formats"]) == report["chosen"]["format"]
    assert load_manifest(out / "packed").config["chosen"] == report["chosen"]
    assert crepe("prune", pico, "--out", tmp_path / "again", *size, "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["chosen"] == without(report["chosen"], "format")
    for name in ("dense", "again"):
        folder = tmp_path / name if name == "again" else out / name
        assert (folder / "model.safetensors").read_bytes() == (out / "dense" / "model.safetensors").read_bytes()


def test_a_command_that_gives_pattern_text_and_formats_is_what_it_was(
    tmp_path: Path, pico: Path, calib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ("--calib", calib, "--calib-samples", 8, "--calib-length", 32)
    given = ("--sparsity", "2:4", *size, "--format", "dense", "--json")
    assert crepe("prune-and-export", pico, "--out", tmp_path / "plain", *given) == 0
    plain = capsys.readouterr()
    assert "--recipe best" in plain.err and "chosen" not in json.loads(plain.out)
    assert crepe("prune-and-export", pico, "--out", tmp_path / "named", "--method", "crepe", *given) == 0
    assert "--recipe best" not in capsys.readouterr().err
    assert crepe("prune-and-export", pico, "--out", tmp_path / "fixed", "--method", "crepe", *size) == 0
    weights = {
        name: (tmp_path / name / "dense" / "model.safetensors").read_bytes() for name in ("plain", "named", "fixed")
    }
    assert len(set(weights.values())) == 1
    assert "chosen" not in load_manifest(tmp_path / "plain" / "dense").config


def test_refusals_come_before_the_model_writes_anything(
    tmp_path: Path, pico: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    for arguments in (
        ("prune", pico, "--out", tmp_path / "taken"),
        ("prune-and-export", pico, "--out", tmp_path / "taken"),
        ("prune-and-export", pico, "--out", tmp_path / "out", "--heal", 1),
        ("prune-and-export", pico, "--out", tmp_path / "out", "--format", "packed", "--precision", "int4"),
        ("tyr", pico, "--out", tmp_path / "out", "--heal", 1),
    ):
        assert crepe(*arguments) == 2
        assert "writes" not in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()
