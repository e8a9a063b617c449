"""The commands as a user types them: what they print, their exit codes, and what bad input leaves behind (nothing)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crepe_deploy.cli import run
from crepe_deploy.errors import EXIT_INTERRUPTED
from crepe_deploy.pruning.methods import METHODS
from crepe_deploy.store import writing
from crepe_deploy.store.manifest import verify
from tests.pico import make_pico_llama, sample_text

CALIBRATION = ["--calib-samples", "4", "--calib-length", "32"]


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(sample_text(3000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("pico") / "model", torch.bfloat16)


def crepe(*arguments: Any) -> int:
    """Run the command line in this process; returns its exit code."""
    return run([str(argument) for argument in arguments])


@pytest.fixture
def prune_to(pico: Path, calib: Path) -> Any:
    """`prune_to(out, *more, model=..., calib=...)`: prune-and-export the pico model; returns the exit code."""

    def call(out: Path, *more: Any, model: Path | str = pico, calib: Path | str = calib) -> int:
        return crepe("prune-and-export", model, "--out", out, "--calib", calib, *CALIBRATION, *more)

    return call


def test_the_command_line_needs_no_torch() -> None:
    imports = "import sys; from crepe_deploy import cli; cli.add_outer_commands()"
    check = "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", f"{imports}; {check}"], check=False).returncode == 0


FORKED_POOL = """
import multiprocessing, os, signal, sys
from crepe_deploy import cli

cli.interrupt_on_signals()
pool = multiprocessing.get_context("fork").Pool(2)
assert pool.map(abs, [-1, -2]) == [1, 2]
pool.terminate()
pool.join()
print("workers ended", file=sys.stderr)
try:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
"""


def test_sigterm_interrupts_the_command_and_ends_forked_workers_silently() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED_POOL], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["workers ended", "interrupted"]


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_command(tmp_path: Path, prune_to: Any, capsys: pytest.CaptureFixture[str], method: str) -> None:
    out = tmp_path / "out"
    assert prune_to(out, "--method", method, "--sparsity", "2:4", "--seed", 0, "--format", "dense", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["pattern"] == "2:4"
    assert report["sparsity_of_pruned_tensors"] == pytest.approx(0.5, abs=1e-3)
    assert sorted(path.name for path in out.iterdir()) == ["dense", "report.json"]


def test_a_mixture_of_texts_is_named_in_the_manifest_and_the_card(tmp_path: Path, prune_to: Any, calib: Path) -> None:
    (tmp_path / "more.jsonl").write_text(json.dumps({"text": sample_text(3000, 1)}), encoding="utf-8")
    out = tmp_path / "out"
    assert prune_to(out, "--calib", tmp_path / "more.jsonl", "--format", "dense") == 0
    parts = verify(out / "dense").calibration["parts"]
    assert [Path(part["source"]).name for part in parts] == ["calib.txt", "more.jsonl"]
    assert f"tokens of {calib} + {tmp_path / 'more.jsonl'}" in (out / "dense" / "README.md").read_text()
    assert prune_to(tmp_path / "twice", "--calib", calib) == 2 and not (tmp_path / "twice").exists()


def test_inspect_verify_export_and_eval(
    tmp_path: Path, prune_to: Any, capsys: pytest.CaptureFixture[str], pico: Path, calib: Path
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert prune_to(out, "--sparsity", "16:32") == 0
    capsys.readouterr()
    assert crepe("inspect", out / "dense", "--json") == 0
    tensors = {tensor["name"]: tensor for tensor in json.loads(capsys.readouterr().out)["tensors"]}
    assert tensors["model.layers.0.mlp.down_proj.weight"]["pattern"] == "16:32"
    assert tensors["model.layers.0.mlp.down_proj.weight"]["zeros"] == 64 * 128 / 2
    assert tensors["model.layers.0.mlp.down_proj.weight"]["sparsity"] == 0.5
    assert tensors["lm_head.weight"]["pattern"] is None

    assert crepe("export", out / "dense", "--out", tmp_path / "copy") == 0
    assert crepe("verify", tmp_path / "copy") == 0
    capsys.readouterr()
    arguments = ["--text", calib, "--window", 64, "--max-tokens", 512, "--against", pico, "--json"]
    assert crepe("eval", tmp_path / "copy", *arguments) == 0
    quality = json.loads(capsys.readouterr().out)
    assert quality["convention"]["windows"] == 8
    assert quality["paired"]["kl_mean"]["value"] > 0

    with (tmp_path / "copy" / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert crepe("verify", tmp_path / "copy") == 1
    assert "tokenizer.json differs" in capsys.readouterr().err


def test_same_model_has_no_divergence(capsys: pytest.CaptureFixture[str], pico: Path, calib: Path) -> None:
    arguments = ["--text", calib, "--window", 64, "--max-tokens", 256, "--against", pico, "--json"]
    assert crepe("eval", pico, *arguments) == 0
    paired = json.loads(capsys.readouterr().out)["paired"]
    assert paired["kl_mean"]["value"] == pytest.approx(0, abs=1e-6)
    assert paired["same_top"]["value"] == 1
    assert paired["perplexity_ratio"]["value"] == pytest.approx(1)


def broken(pico: Path, root: Path) -> Path:
    """A copy of the pico model to damage."""
    root.mkdir()
    for path in pico.iterdir():
        (root / path.name).write_bytes(path.read_bytes())
    return root


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poison(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def forget_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated or damaged"),
        (poison, "'model.layers.1.mlp.up_proj.weight' holds NaN"),
        (forget_tensor, "tensor 'model.norm.weight' is missing"),
        (lambda model: (model / "model.safetensors").unlink(), "reads safetensors only"),
        (lambda model: (model / "model.safetensors").write_bytes(b"garbage"), "too short for a safetensors file"),
        (lambda model: (model / "config.json").unlink(), "config.json is missing"),
        (lambda model: (model / "config.json").write_text("{"), "is not JSON that can be read"),
    ],
)
def test_damaged_models(
    tmp_path: Path, prune_to: Any, capsys: pytest.CaptureFixture[str], pico: Path, damage: Any, message: str
) -> None:
    model = broken(pico, tmp_path / "model")
    damage(model)
    assert prune_to(tmp_path / "out", model=model) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "wunda"], "known: magnitude, wanda, ria, crepe, sparsegpt"),
        (["--sparsity", "2of4"], "is not understood"),
        (["--sparsity", "4:2"], "N < M"),
        (["--sparsity", "3:5"], "do not split into groups of 5"),
        (["--sparsity", "1.5"], "fraction of zeros"),
        (["--format", "gif"], "known: dense"),
        (["--format", "dense,dense"], "different formats"),
        (["--param", "exponent"], "is not NAME=VALUE"),
        (["--param", "zeal=3"], "zeal"),
        (["--preset", "nobody"], "nobody"),
        (["--revision", "main"], "applies to hub ids only"),
        (["--calib-samples", "0"], "calib-samples"),
        (["--calib-samples", "100000"], "short"),
        (["--nonsense"], "nonsense"),
        (["--exclude", "\udcff"], "not UTF-8"),
    ],
)
def test_bad_options(
    tmp_path: Path, prune_to: Any, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert prune_to(tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bad_calibration_text(tmp_path: Path, prune_to: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1") * 500)
    (tmp_path / "short.txt").write_text("too short")
    for name, message in [("empty", "empty"), ("latin", "not UTF-8"), ("short", "short"), ("none", "none.txt")]:
        assert prune_to(tmp_path / "out", calib=tmp_path / f"{name}.txt") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_output_that_exists_or_is_the_input(
    tmp_path: Path, prune_to: Any, capsys: pytest.CaptureFixture[str], pico: Path
) -> None:
    out = tmp_path / "out"
    assert prune_to(out) == 0
    before = (out / "report.json").read_bytes()
    assert prune_to(out, "--sparsity", "4:8") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "report.json").read_bytes() == before
    assert prune_to(out, "--sparsity", "4:8", "--overwrite") == 0
    assert json.loads((out / "report.json").read_text())["pattern"] == "4:8"
    assert prune_to(pico, "--overwrite") == 2
    assert "one folder" in capsys.readouterr().err


def test_a_model_that_is_nowhere(tmp_path: Path, prune_to: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune_to(tmp_path / "out", model=tmp_path / "nowhere") == 2
    assert "no folder on this disk and no hub id" in capsys.readouterr().err


def test_full_disk(
    tmp_path: Path, prune_to: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_write_exactly", full)
    assert prune_to(tmp_path / "out") == 1
    assert "disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopping_leaves_nothing(tmp_path: Path, calib: Path, stop: signal.Signals) -> None:
    model = make_pico_llama(tmp_path / "model", num_hidden_layers=60)
    arguments = ["prune-and-export", model, "--out", tmp_path / "out", "--calib", calib, "--method", "sparsegpt"]
    command = [
        sys.executable,
        "-m",
        "crepe_deploy",
        *map(str, arguments),
        "--calib-samples",
        "60",
        "--calib-length",
        "64",
    ]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(stop, signal.SIG_DFL),  # shells ignore SIGINT for what runs in the background
    ) as process:
        deadline = time.monotonic() + 3600
        while not (tmp_path / "out.work" / "pruned" / "model.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(stop)
        _, error = process.communicate(timeout=3600)
    assert process.returncode == EXIT_INTERRUPTED
    assert "stopped before the first piece (block, layer, file or round) was whole: nothing was left behind" in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_hub_that_does_not_answer(
    tmp_path: Path, prune_to: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert prune_to(tmp_path / "out", model="nobody/nothing-of-this-name") == 2
    assert "the hub did not give it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_foresaw_is_one_line_and_a_file_with_the_details(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_root: Path) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("crepe_deploy.store.manifest.verify", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run(["verify", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (details,) = tmp_path.glob("crepe-deploy-*.txt")
    assert line.startswith("error: unexpected ZeroDivisionError: division by zero;") and line.endswith(str(details))
    assert "Traceback" in details.read_text() and f"crepe-deploy verify {tmp_path}" in details.read_text()
    assert run(["--debug", "verify", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err
