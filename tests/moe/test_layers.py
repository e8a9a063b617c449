"""`plan` and `inspect` say what a mixture of experts holds, and what stays of it is what is then written."""

from __future__ import annotations

from pathlib import Path

import torch

import crepe_deploy
from crepe_deploy.commands.inspect import expert_lines
from crepe_deploy.commands.plan import lines
from tests.pico import VOCAB, make_pico_llama
from tests.pico_moe import make_moe


def test_what_stays_is_predicted(tmp_path: Path) -> None:
    folder = make_moe(tmp_path / "moe", "deepseek_v3")
    plan, inspection = crepe_deploy.plan(folder), crepe_deploy.inspect(folder)
    experts = plan["experts"]
    assert inspection.experts == experts and inspection.to_dict()["experts"] == experts
    assert (experts["layers"], experts["experts"], experts["per_token"], experts["groups"]) == (2, 8, 2, 2)
    assert plan["prunable_tensors"] > 0 and "crepe-deploy experts" in "\n".join(lines(plan))
    assert "2 layers of 8 experts, 2 for a token" in expert_lines(experts)[0]
    tokens = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    report = crepe_deploy.experts(folder, tmp_path / "out", remove=0.5, calib=tokens)
    routers = 2 * 4 * (64 + 1)  # rows and biases, which the prediction leaves out
    assert report["parameters"]["after"]["held"] == experts["held_without"]["0.5"] - routers
    assert report["parameters"]["before"] == experts["parameters"]


def test_a_dense_model_has_none(tmp_path: Path) -> None:
    folder = make_pico_llama(tmp_path / "llama")
    assert "experts" not in crepe_deploy.plan(folder) and "experts" not in crepe_deploy.inspect(folder).to_dict()
