"""`plan` predicts what the run then does; `doctor` names what is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from crepe_deploy.exporting.pipeline import export_checkpoint

from crepe_deploy.api.doctor import doctor
from crepe_deploy.api.plan import gpu_gains, gpu_truth, plan
from crepe_deploy.cli import run
from crepe_deploy.commands.doctor import gpu_lines
from crepe_deploy.commands.doctor import lines as doctor_lines
from crepe_deploy.commands.plan import lines
from crepe_deploy.errors import PatternError
from crepe_deploy.pattern import parse_pattern
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.sources import resolve_model
from tests.pico import make_pico_llama


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "16:32", "0.5"])
def test_the_predicted_bytes_are_the_written_bytes(tmp_path: Path, pattern: str) -> None:
    model = make_pico_llama(tmp_path / "model", torch.bfloat16)
    expected = plan(model, sparsity=pattern, calib_samples=4, calib_length=32)
    prune(resolve_model(str(model)), tmp_path / "pruned", prune_config("magnitude", pattern), None)
    export_checkpoint(tmp_path / "pruned", tmp_path / "packed", "packed")
    header = 8192  # names and offsets
    written = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert expected["packed_checkpoint_bytes"] < written < expected["packed_checkpoint_bytes"] + header
    if parse_pattern(pattern).sparsity == 0.5:
        assert expected["pruned_tensors_packed_over_dense"] == 0.5625


def test_misfits_are_listed(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model", intermediate_size=120)
    result = plan(model, sparsity="16:32", calib_samples=4, calib_length=32)
    assert len(result["does_not_divide"]) == 2
    assert any("does not divide: 2 tensors" in line for line in lines(result))
    assert plan(model, calib_samples=4, calib_length=32)["not_packable"] == result["does_not_divide"]


def test_doctor_says_which_kernels_run_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)["packed_cpu"]
    assert packed["isa"] in packed["supported"]
    assert packed["reason"]


def test_gpu_gains_are_ranges_over_what_was_measured() -> None:
    measured = [{"batch": 1, "gain_over_dense": gain} for gain in (1.5, 1.2)] + [{"batch": 64, "gain_over_dense": 0.9}]
    assert gpu_gains(measured).endswith("batch 1: 1.20x to 1.50x, batch 64: 0.90x to 0.90x")


def test_without_a_gpu_no_speed_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no speed is promised" in gpu_truth({(64, 64)})
    assert "nothing measured" in gpu_lines([])[0]


def test_measured_gpu_choices_are_one_line_a_shape() -> None:
    entry = {"dtype": "bfloat16", "kind": "nibble", "shape": [64, 128], "choice": "stream n16 m1 s1 w4 p1"}
    measured = [entry | {"batch": 16, "gain_over_dense": None}, entry | {"batch": 1, "gain_over_dense": 1.5}]
    (line,) = gpu_lines(measured)
    assert (
        line == "  64x128 bfloat16 nibble, by batch, speed over dense (higher is better): 1: stream 1.50x, 16: stream"
    )


def test_one_line_says_the_most_memory_that_is_needed(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model")
    for result in (plan(model), plan(model, sparsity="2:4", calib_samples=4, calib_length=32)):
        (said,) = (line for line in lines(result) if "memory" in line)
        parts = [result["peak_memory_estimate_bytes"], result["calib_self_memory_estimate_bytes"]]
        assert f"at most about: {max(parts) / 1e6:,.0f} MB (" in said


@pytest.mark.parametrize(
    ("given", "meant"), [("50", "mean 0.5"), ("32:16", "mean 16:32"), ("1.5", "mean 0.015"), ("4:4", ""), ("-1", "")]
)
def test_a_pattern_that_was_nearly_one(given: str, meant: str) -> None:
    with pytest.raises(PatternError) as refused:
        parse_pattern(given)
    assert meant in str(refused.value) and ("did you mean" in str(refused.value)) == bool(meant)


def test_doctor_names_the_extra_of_what_is_not_installed() -> None:
    result = doctor()
    result["installed"] = dict.fromkeys(result["installed"])
    missing = [line for line in doctor_lines(result) if "not installed" in line]
    assert len(missing) == len(result["installed"]) and all("pip install 'crepe-deploy[" in line for line in missing)


@pytest.mark.parametrize(("version", "place"), [("0.32.0+cpu", "CPU"), ("0.32.0", "GPU"), (None, "GPU")])
def test_doctor_says_of_vllm_what_this_build_serves_on(version: str | None, place: str) -> None:
    result = doctor()
    result["installed"]["vllm"] = version
    (line,) = [line for line in doctor_lines(result) if line.startswith("vllm:")]
    assert line.endswith(f"(serve checkpoints on a {place})")


def test_inspect_has_a_header_and_a_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_pico_llama(tmp_path / "model")
    prune(resolve_model(str(model)), tmp_path / "pruned", prune_config("magnitude", "2:4"), None)
    capsys.readouterr()
    assert run(["inspect", str(tmp_path / "pruned")]) == 0
    head, *rows, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["zeros", "pattern", "dtype", "shape", "tensor"]
    assert (
        total
        == f"{len(rows)} tensors, {sum(' 2:4 ' in row for row in rows)} of them with a pattern, 50.00% zeros in these"
    )
