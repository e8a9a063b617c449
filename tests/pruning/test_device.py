"""Pruning on another device, on a stand-in for a GPU (see `tests.stand_in`): nothing on the wrong side, equal masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crepe_deploy import device
from crepe_deploy.pattern import Unstructured
from crepe_deploy.pruning import prune as pruning
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.methods import METHODS
from crepe_deploy.pruning.prune import prune
from crepe_deploy.pruning.steps import KINDS
from crepe_deploy.store.manifest import Manifest
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.texts import calibration_windows, load_tokenizer
from tests.pico import make_pico, make_pico_llama
from tests.pruning.test_prune import CONFIGS
from tests.pruning.test_resume import Pruned
from tests.stand_in import stand_in


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("model") / "m", torch.bfloat16)


def pruned(
    model: Path,
    out: Path,
    text: Path,
    method: str = "crepe",
    pattern: Any = "2:4",
    resume: bool = False,
    **options: Any,
) -> tuple[Manifest, dict[str, torch.Tensor]]:
    calibration = calibration_windows(text, load_tokenizer(model), 8, 32, seed=0)
    config = prune_config(method, pattern, **options)
    manifest = prune(resolve_model(str(model)), out, config, calibration, resume=resume, device=device.resolve("auto"))
    return manifest, load_file(out / "model.safetensors")


def check_same(model: Path, folder: Path, text: Path, *, bits: bool = True, **options: Any) -> None:
    """Equal bytes, for the stand-in computes as the CPU does; without `bits` equal zeros.

    Gradients are taken through other kernels there, and Adam's steps.
    """
    _, expected = pruned(model, folder / "cpu", text, **options)
    with stand_in():
        manifest, found = pruned(model, folder / "device", text, **options)
    assert manifest.tensors
    for name, tensor in expected.items():
        if bits:
            assert torch.equal(found[name], tensor), name
        else:
            assert torch.equal(found[name] == 0, tensor == 0), name
            torch.testing.assert_close(found[name], tensor, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(tmp_path: Path, model: Path, text: Path, method: str) -> None:
    for pattern in ("2:4", "0.5"):
        check_same(model, tmp_path / pattern.replace(":", "of"), text, method=method, pattern=pattern)


STEPS = [(kind, name) for kind, registry in KINDS.items() for name in registry]


@pytest.mark.parametrize(("kind", "name"), STEPS)
def test_every_step(tmp_path: Path, model: Path, text: Path, kind: str, name: str) -> None:
    more = {"reconstruct": "exact"} if kind == "rescale" else {}
    check_same(model, tmp_path, text, bits=kind != "repair", **{**more, kind: name})


@pytest.mark.parametrize("feed", ["dense", "pruned", "both"])
def test_every_feed(tmp_path: Path, model: Path, text: Path, feed: str) -> None:
    check_same(model, tmp_path, text, feed=feed, reconstruct="exact")


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "gpt_neox"])
def test_families_of_other_shapes_with_the_recipe_best(tmp_path: Path, text: Path, family: str) -> None:
    made = make_pico(tmp_path / "m", CONFIGS[family])
    check_same(made, tmp_path, text, method=None, recipe="best")


def test_hidden_states_may_stay_on_the_device(
    tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "free_bytes", lambda _: 1 << 40)
    check_same(model, tmp_path, text, method=None, recipe="best")


def test_a_pattern_over_the_matrix_and_another_dtype_to_compute_in(tmp_path: Path, model: Path, text: Path) -> None:
    check_same(model, tmp_path, text, pattern=Unstructured(0.5, "matrix"), dtype="float32", reconstruct="admm")


def test_a_stopped_run_goes_on(tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"method": "wanda", "feed": "both", "reconstruct": "exact"}
    _, expected = pruned(model, tmp_path / "cpu", text, **options)
    with stand_in():
        with monkeypatch.context() as patch:
            patch.setattr(pruning, "prune_block", Pruned(1, KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                pruned(model, tmp_path / "device", text, **options)
        _, found = pruned(model, tmp_path / "device", text, resume=True, **options)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
