"""Every method and step over odd numbers: finite weights in the exact pattern, or an error that names the layer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import crepe_deploy
from crepe_deploy.errors import CalibrationError, NumericalError, VerifyError
from crepe_deploy.pattern import parse_pattern, zero_count
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.layer import layer_error
from crepe_deploy.pruning.methods import METHODS
from crepe_deploy.pruning.methods.base import Solution
from crepe_deploy.pruning.prune import prune
from crepe_deploy.select import select
from crepe_deploy.store.audit import holds
from crepe_deploy.store.manifest import Manifest
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.store.writing import CheckpointWriter
from tests.pico import make_pico_llama, sample_text
from tests.pruning.degenerate import HALF, LAYER, ODD, WIDE, Make, odd_model
from tests.pruning.test_prune import windows

WAYS: list[tuple[str | None, str, dict[str, str]]] = [
    *((method, "2:4", {}) for method in METHODS),
    ("sparsegpt", "0.5", {}),
    *(("ria", "4:8", {"allocate": name}) for name in ("owl", "error")),
    ("magnitude", "4:8", {"allocate": "alpha"}),
    ("sparsegpt", "2:4", {"permute": "fold"}),
    ("ria", "2:4", {"reprune": "dsnot"}),
    ("ria", "2:4", {"reprune": "swaps"}),
    *(("magnitude", "2:4", {"reconstruct": name}) for name in ("exact", "admm", "obs")),
    (None, "2:4", {"recipe": "best"}),
]
MODELS: list[tuple[str, Make, torch.dtype]] = [
    *((name, make, torch.float32) for name, make in (ODD | WIDE).items()),
    *((name, WIDE[name], torch.bfloat16) for name in ("one of 1e30", "subnormal")),
    *((name, make, torch.float16) for name, make in HALF.items()),
]
WAYS_OUT = ("--dtype float32", "other text", "leave the layer out", "more text")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(sample_text(3000), encoding="utf-8")
    return path


def run(model: Path, out: Path, text: Path, method: str | None, pattern: str, **steps: Any) -> Manifest:
    config = prune_config(method, parse_pattern(pattern), **steps)
    return prune(resolve_model(str(model)), out, config, windows(model, text, samples=4, length=32))


def numbers(content: Any) -> Iterator[Any]:
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from numbers(value)
    elif isinstance(content, float):
        yield content


def check(model: Path, out: Path, manifest: Manifest) -> None:
    """Finite weights in the pattern, no more zeros than that asks for and there were, and finite figures."""
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    for name, record in manifest.tensors.items():
        pattern = parse_pattern(record.pattern.partition("/")[0])
        weight, was = after[name].float(), before[name].float()
        assert weight.isfinite().all() and holds(weight, pattern), name
        dead = record.notes.get("zeros_of_dead_inputs", 0.0)
        asked = zero_count(pattern, *weight.shape) + int((was == 0).sum()) + dead + 0.01 * weight.numel()
        assert int((weight == 0).sum()) <= asked, name
        assert record.layer_error is not None and math.isfinite(record.layer_error), name
    assert all(map(math.isfinite, numbers(manifest.metrics)))
    written = json.loads((out / "manifest.json").read_text())
    assert None not in [record["layer_error"] for record in written["tensors"].values()]
    notes = [record["notes"] for record in written["tensors"].values()]
    assert not [each for each in notes if None in each.values()]


@pytest.mark.parametrize(("name", "make", "dtype"), MODELS, ids=[f"{name}, {dtype}"[:40] for name, _, dtype in MODELS])
def test_every_way_over_odd_numbers(name: str, make: Make, dtype: torch.dtype, text: Path, tmp_path: Path) -> None:
    model = odd_model(tmp_path / "m", make, dtype)
    for index, (method, pattern, steps) in enumerate(WAYS):
        out = tmp_path / f"out-{index}"
        try:
            manifest = run(model, out, text, method, pattern, **steps)
        except NumericalError as error:
            assert "model.layers." in str(error) or "logits" in str(error), (method, steps, str(error))
            assert any(way in str(error) for way in WAYS_OUT), str(error)
            assert not out.exists()
        else:
            check(model, out, manifest)


def test_layer_errors_of_weights_that_fp32_cannot_square() -> None:
    weight = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    mask = torch.arange(16) % 2 == 0
    expected = layer_error(weight, weight * mask, torch.ones(16))
    for size in (1e30, 1e-30, 1e-39):
        found = layer_error(weight * size, weight * size * mask, torch.ones(16))
        assert found == pytest.approx(expected, rel=1e-5)
    assert layer_error(weight * 0, weight * 0, None) == 0


@pytest.mark.parametrize(
    ("scale", "steps"), [(1e25, {}), (1e-25, {}), (1e-36, {}), (1e25, {"reconstruct": "exact"})], ids=str
)
def test_the_size_of_a_layer_decides_nothing(scale: float, steps: dict[str, str], text: Path, tmp_path: Path) -> None:
    """What is kept of a layer is what is kept of the same one at a common size."""
    masks = []
    for factor in (1.0, scale):
        model = odd_model(tmp_path / f"m{factor}", lambda weights, by=factor: weights[LAYER].mul_(by))
        for method in ("wanda", "ria", "sparsegpt"):
            run(model, tmp_path / f"{method}{factor}", text, method, "2:4", **steps)
            masks.append(load_file(tmp_path / f"{method}{factor}" / "model.safetensors")[LAYER] != 0)
    for plain, odd in zip(masks[:3], masks[3:], strict=True):
        assert (plain == odd).float().mean() > 0.999


@pytest.mark.parametrize("command", ["prune", "search", "tyr"])
@pytest.mark.parametrize("text", ["</s>" * 4000, "<s>" + "</s>" * 4000], ids=["padding", "behind BOS"])
def test_a_text_of_one_token_is_refused_before_any_work(command: str, text: str, tmp_path: Path) -> None:
    model, file = make_pico_llama(tmp_path / "m"), tmp_path / "calib.txt"
    file.write_text(text, encoding="utf-8")
    small: dict[str, Any] = {"calib": file, "calib_samples": 4, "calib_length": 64}
    with pytest.raises(CalibrationError, match=r"calib\.txt.*nothing but token 1 .*give other text"):
        if command == "prune":
            crepe_deploy.prune(model, tmp_path / "out", method="sparsegpt", **small)
        elif command == "search":
            crepe_deploy.search(model, tmp_path / "out.json", text=file, **small)
        else:
            crepe_deploy.tyr(model, tmp_path / "out", sparsity=0.3, **small)
    assert not (tmp_path / "out").exists()


def test_padding_among_the_documents_is_no_reason_to_refuse(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    documents = ["</s>" * 500, sample_text(500), "</s>" * 500]
    manifest = crepe_deploy.prune(
        model, tmp_path / "out", method="sparsegpt", calib=documents, calib_samples=8, calib_length=64
    )
    assert manifest.metrics["sparsity_of_pruned_tensors"] == 0.5


def test_a_solver_that_zeroes_what_it_keeps_has_failed(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    def all_zero(self: Any, weight: Any, stats: Any, pattern: Any) -> Solution:
        mask = select(weight.abs(), pattern)
        return Solution(torch.zeros_like(weight), mask, {})

    monkeypatch.setattr(METHODS["sparsegpt"], "solve", all_zero)
    with pytest.raises(NumericalError, match=r"q_proj\.weight: the update left 2048 of the 2048 kept weights zero"):
        run(make_pico_llama(tmp_path / "m"), tmp_path / "out", text, "sparsegpt", "2:4")
    assert not (tmp_path / "out").exists()


def test_zeros_that_were_not_meant_are_found_in_the_files(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    def write(self: Any, name: str, tensor: torch.Tensor) -> None:
        real(self, name, torch.zeros_like(tensor) if name == LAYER else tensor)

    real = CheckpointWriter.write
    monkeypatch.setattr(CheckpointWriter, "write", write)
    with pytest.raises(VerifyError, match=r"down_proj\.weight: 8192 zeros were written of 4096"):
        run(make_pico_llama(tmp_path / "m"), tmp_path / "out", text, "wanda", "2:4")
