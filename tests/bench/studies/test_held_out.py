"""The error of reconstructions on windows that they were not calibrated on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from crepe_deploy.bench.studies.held_out import ROWS, gram_matrices, held_out_error

from crepe_deploy.pruning.steps import build_step
from crepe_deploy.quality.perplexity import load_model
from tests.pico import make_pico_llama


def test_the_error_is_that_of_the_outputs_and_reconstruction_lowers_it() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator)
    seen, unseen = (torch.randn(rows, 32, generator=generator) @ mix for rows in (4000, 500))
    weight = torch.randn(16, 32, generator=generator)
    grams = seen.T @ seen, unseen.T @ unseen
    plain, fitted = (held_out_error(weight, grams[0], 8, grams[1], step) for step in (None, "exact"))
    assert 0 < fitted < plain < 1
    assert held_out_error(weight, grams[0], 8, 9 * grams[1], None) == pytest.approx(plain, rel=1e-5)


def test_the_sums_are_those_of_the_inputs(tmp_path: Path) -> None:
    model = load_model(make_pico_llama(tmp_path / "m"))
    name = "model.layers.1.mlp.down_proj"
    tokens = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(1))
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    steps = list(gram_matrices(model, tokens, [name]))
    handle.remove()
    assert [done for done, _ in steps] == [4, 8]
    assert torch.allclose(steps[-1][1][name], torch.cat(inputs).T @ torch.cat(inputs), rtol=1e-4, atol=1e-5)


def test_every_row_is_a_step() -> None:
    for step, _ in ROWS.values():
        if step is not None:
            build_step("reconstruct", step)
