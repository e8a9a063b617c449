"""`--repair block`: a pruned block comes nearer to the dense one, its zeros stay, and it never ends worse."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.calls import Call, Form
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.pruning.steps.repair import BlockRepair, Lesson, relative_error
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.manifest import Manifest, verify
from crepe_deploy.store.sources import resolve_model
from tests.pico import make_pico_llama
from tests.pruning.test_prune import text as text
from tests.pruning.test_prune import windows

QUICK = "block:steps=12,rate=0.003"


def run(model: Path, out: Path, text: Path, pattern: str = "2:4", **config: Any) -> Manifest:
    settings = {"reconstruct": "exact:max_steps=3", "repair": QUICK, **config}
    return prune(
        resolve_model(str(model)), out, prune_config("ria", pattern, **settings), windows(model, text, samples=16)
    )


def weights(folder: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(folder)
    return {name: reader.load(name) for name in reader.tensors}


@pytest.mark.parametrize("pattern", ["2:4", "0.5", "0.6/matrix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_come_nearer_and_zeros_stay(tmp_path: Path, text: Path, pattern: str, dtype: torch.dtype) -> None:
    model = make_pico_llama(tmp_path / "m", dtype)
    repaired = run(model, tmp_path / "repaired", text, pattern)
    errors = repaired.metrics["repair"]
    assert len(errors) == 2 and all(block["after"] <= block["before"] for block in errors)
    assert errors[0]["after"] < errors[0]["before"]
    after, before = weights(tmp_path / "repaired"), weights(model)
    assert all(int((after[name] == 0).sum()) == record.zeros for name, record in repaired.tensors.items())
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed >= set(repaired.tensors) and "model.layers.0.input_layernorm.weight" in changed
    assert all(name.startswith("model.layers.") for name in changed)
    verify(tmp_path / "repaired")
    run(model, tmp_path / "again", text, pattern)
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(tmp_path / "again").items())


def test_layers_that_are_left_dense_stay_as_they_are(tmp_path: Path, text: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    run(model, tmp_path / "out", text, exclude="mlp")
    after, before = weights(tmp_path / "out"), weights(model)
    assert all(torch.equal(after[name], before[name]) for name in after if "mlp" in name)


class Bent(nn.Module):
    """Two layers with something between them that no layer-wise fit sees, and a norm."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up = nn.Linear(16, 32, bias=False, dtype=dtype)
            self.down = nn.Linear(32, 16, bias=False, dtype=dtype)
        self.norm = nn.Parameter(torch.ones(16, dtype=dtype))
        self.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        bent: Tensor = hidden + self.down(self.up(hidden * self.norm).relu())
        return bent


def lessons(dense: nn.Module, dtype: torch.dtype) -> list[Lesson]:
    """Inputs and outputs as a run has them: made in inference mode."""
    generator = torch.Generator().manual_seed(1)
    call = Call(Form(), (None,), {})
    with torch.inference_mode():
        inputs = [torch.randn(4, 8, 16, generator=generator).to(dtype) for _ in range(4)]
        return [Lesson(call, given, dense(given)) for given in inputs]


def pruned(dtype: torch.dtype) -> tuple[Bent, dict[str, Tensor], list[Lesson]]:
    taught = lessons(Bent(dtype), dtype)
    block = Bent(dtype)
    for layer in (block.up, block.down):
        layer.weight.data[:, ::2] = 0
    return block, {name: parameter.data for name, parameter in block.named_parameters()}, taught


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_that_it_tells_is_that_of_what_is_stored(dtype: torch.dtype) -> None:
    block, tuned, taught = pruned(dtype)
    found = BlockRepair(steps=60, rate=0.01)(block, tuned, taught[:3], taught[3:])
    assert found.after < 0.9 * found.before and found.step > 0
    with torch.no_grad():
        assert float(relative_error(block(taught[3].given), taught[3].wanted)) == found.after
    assert all(bool((layer.weight[:, ::2] == 0).all()) for layer in (block.up, block.down))
    assert all(bool((layer.weight[:, 1::2] != 0).all()) for layer in (block.up, block.down))
    assert not any(parameter.requires_grad for parameter in block.parameters())


@pytest.mark.parametrize("wanted", [1.0, math.nan])
def test_what_gets_worse_is_undone(wanted: float) -> None:
    block, tuned, taught = pruned(torch.float32)
    before = {name: tensor.clone() for name, tensor in tuned.items()}
    taught[:3] = [replace(lesson, wanted=lesson.wanted * wanted) for lesson in taught[:3]]
    found = BlockRepair(steps=4, rate=1.0)(block, tuned, taught[:3], taught[3:])
    assert (found.step, found.after) == (0, found.before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.items())


def test_a_file_of_another_dtype_than_computation_holds_what_the_block_computes_with() -> None:
    block, _, taught = pruned(torch.float32)
    stored = {name: parameter.data.bfloat16() for name, parameter in block.named_parameters()}
    BlockRepair(steps=20, rate=0.01)(block, stored, taught[:3], taught[3:])
    assert all(torch.equal(block.get_parameter(name), tensor.float()) for name, tensor in stored.items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"feed": "pruned"}, "--repair compares with the dense model"),
        ({"repair": "layer"}, "known: block"),
        ({"repair": "block:steps=0"}, "steps is 0"),
        ({"repair": "block:windows=0"}, "windows is 0"),
    ],
)
def test_what_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune_config("ria", "2:4", **{"repair": "block", **config})
