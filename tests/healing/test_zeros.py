"""Zeros that are held while something trains the model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from crepe_deploy.errors import ConfigError, VerifyError
from crepe_deploy.healing import HoldZeros, hold_zeros
from crepe_deploy.store.audit import held_pattern
from tests.pico import make_pico_llama, sample_text

ROOT = Path(__file__).resolve().parents[2]


def pruned_layers(zero: tuple[int, ...] = (1, 3)) -> nn.Sequential:
    """An embedding, a norm, a layer pruned to 2:4, a dense one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8))
    weight = model.get_parameter("2.weight").data.view(8, 2, 4)
    weight[:, :, list(zero)] = 0
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for seed in range(steps):
        tokens = torch.randint(16, (4,), generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(tokens).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda given: torch.optim.AdamW(given, lr=0.1, weight_decay=0.1),
        lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9, nesterov=True),
        lambda given: torch.optim.Adagrad(given, lr=0.1),
    ],
)
def test_zeros_stay_whatever_the_optimiser(make: Any) -> None:
    model = pruned_layers()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with hold_zeros(model) as held:
        assert list(held.masks) == ["2.weight"]
        train(model, make(model.parameters()))
        assert held.prove() == {"2.weight": 32}
    assert held_pattern(model.get_parameter("2.weight")) == "2:4"
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_an_optimiser_with_state_from_before_loses_no_zero() -> None:
    model = pruned_layers(zero=())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    model.get_parameter("2.weight").data[:, ::2] = 0
    with hold_zeros(model):
        train(model, optimizer)
    assert (model.get_parameter("2.weight")[:, ::2] == 0).all()


def test_gradients_of_held_zeros_are_zero() -> None:
    model = pruned_layers()
    with hold_zeros(model) as held:
        model(torch.arange(4)).square().sum().backward()
        gradient = model.get_parameter("2.weight").grad
        assert gradient is not None and (gradient[held.masks["2.weight"]] == 0).all() and gradient.any()


def test_what_is_released_is_held_no_longer_and_lost_zeros_are_named() -> None:
    model = pruned_layers()
    held = hold_zeros(model)
    assert held.release() == {"2.weight": 32}
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(VerifyError, match=r"'2\.weight' has lost 32"):
        held.prove()


def test_an_error_inside_is_not_hidden() -> None:
    model = pruned_layers()
    with pytest.raises(ZeroDivisionError), hold_zeros(model):
        model.get_parameter("2.weight").data.fill_(1)
        raise ZeroDivisionError


def test_what_cannot_be_held_is_said() -> None:
    dense = pruned_layers(zero=())
    with pytest.raises(ConfigError, match="no weight of the model has zeros"):
        hold_zeros(dense)
    with pytest.raises(ConfigError, match=r"no parameter '9\.weight'"):
        hold_zeros(dense, ["9.weight"])
    with hold_zeros(dense, []) as held:
        assert held.prove() == {}


def test_a_fresh_adapter_is_not_held_at_nothing() -> None:
    model = pruned_layers()
    model.append(nn.Linear(8, 8))
    model.get_parameter("4.weight").data.zero_()
    with hold_zeros(model) as held:
        assert list(held.masks) == ["2.weight"]


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from crepe_deploy.api.prune import prune

    monkeypatch.chdir(tmp_path)
    make_pico_llama(tmp_path / "model", torch.float32)
    prune("model", "pruned", method="magnitude", sparsity="2:4")
    (tmp_path / "train.txt").write_text(sample_text(3000))
    page = (ROOT / "docs" / "heal.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "docs/heal.md", "exec"), {})
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("pruned", "trained"))
    changed = 0
    for name, weight in before.named_parameters():
        trained = after.get_parameter(name)
        assert (trained[weight == 0] == 0).all(), name
        changed += not torch.equal(weight, trained)
    assert changed > 10


def test_a_training_that_failed_leaves_nothing_held() -> None:
    model, callback = pruned_layers(), HoldZeros()
    callback.on_train_begin(None, None, None, model=model)
    callback.on_train_begin(None, None, None, model=model)
    callback.on_train_end(None, None, None, model=model)
    assert callback.zeros == {"2.weight": 32}
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (model.get_parameter("2.weight") != 0).all()


def test_zeros_of_weights_that_processes_share() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", "localhost:0", str(Path(__file__).parent / "sharded.py")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held 16") == 2
