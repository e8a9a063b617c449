"""What `experts` writes is the whole model with the gone experts' router logits at minus infinity."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import crepe_deploy
from crepe_deploy.errors import CheckpointError, ConfigError, CrepeError, UnsupportedModel
from crepe_deploy.model.families import family_of
from crepe_deploy.store.manifest import verify
from tests.moe.reference import without
from tests.pico import VOCAB, make_pico_llama
from tests.pico_moe import FAMILIES, make_moe
from tests.stand_in import NAME, stand_in

TOKENS = torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))


def removed(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    return crepe_deploy.experts(model, out, **({"calib": TOKENS} | options))


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def masked(folder: Path, kept: dict[str, list[int]]) -> Any:
    """The whole model by stock transformers, with the logits of the experts that are gone at minus infinity."""
    model = stock(folder)
    experts = family_of(model.config.model_type).experts
    assert experts is not None
    for index, stay in kept.items():
        router = model.model.layers[int(index)].get_submodule(experts.router)
        gone = sorted(set(range(8)) - set(stay))

        def forward(hidden: Tensor, before: Any = copy.deepcopy(router), gone: list[int] = gone) -> Any:  # noqa: B008
            return (None, *without(before, gone, hidden))

        router.forward = forward
    return model


@torch.inference_mode()
def greedy(model: Any) -> Tensor:
    tokens = TOKENS[:1, :8]
    for _ in range(12):
        tokens = torch.cat([tokens, model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("layout", FAMILIES)
def test_the_folder_is_the_model_with_experts_masked(tmp_path: Path, layout: str) -> None:
    folder = make_moe(tmp_path / "moe", layout)
    report = removed(folder, tmp_path / "out", remove=0.25)
    dense = tmp_path / "out" / "dense"
    smaller, whole = stock(dense), masked(folder, report["experts"]["layers"])
    with torch.inference_mode():
        torch.testing.assert_close(
            smaller(input_ids=TOKENS, use_cache=False).logits, whole(input_ids=TOKENS, use_cache=False).logits,
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip
    assert torch.equal(greedy(smaller), greedy(whole))
    assert report["experts"]["kept"] == 6 and all(len(stay) == 6 for stay in report["experts"]["layers"].values())
    assert report["parameters"]["after"]["held"] == sum(
        t.numel() for t in load_file(dense / "model.safetensors").values()
    )
    assert 0 < report["effective_experts"]["after"] <= 6
    verify(dense)
    assert "6 of 8 experts" in (dense / "README.md").read_text()
    ids = torch.tensor([report["greedy"]["prompt_token_ids"] + report["greedy"]["token_ids"]])
    with torch.inference_mode():
        continued = smaller(input_ids=ids, use_cache=False).logits[0].argmax(-1)
    assert continued[-9:-1].tolist() == report["greedy"]["token_ids"]


def test_a_layer_beyond_the_model_is_left_whole(tmp_path: Path) -> None:
    folder = make_moe(tmp_path / "moe", "deepseek_v3")
    weights = load_file(folder / "model.safetensors")
    extra = {
        name.replace("layers.2.", "layers.3."): tensor.clone()
        for name, tensor in weights.items()
        if "layers.2." in name
    }
    save_file(weights | extra, folder / "model.safetensors", {"format": "pt"})
    report = removed(folder, tmp_path / "out", remove=4)
    assert report["experts"]["left_whole"] == [3]
    written = load_file(tmp_path / "out" / "dense" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in extra.items())
    assert len(written["model.layers.2.mlp.gate.weight"]) == 4


def plant(folder: Path, useless: list[int]) -> None:
    """Make experts of every layer compute next to nothing, and the router, whose next choice then counts, shun them."""
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if any(f".experts.{expert}.down_proj." in name for expert in useless):
            tensor.mul_(1e-3)
        if ".gate.e_score" in name:
            tensor.zero_()
            tensor[useless] = -0.3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("method", ["reap", "output-error"])
def test_planted_experts_that_do_nothing_are_found(tmp_path: Path, method: str) -> None:
    folder = make_moe(tmp_path / "moe", "glm4_moe-raw")
    plant(folder, [2, 5])
    weights = load_file(folder / "model.safetensors")
    report = removed(folder, tmp_path / "out", remove=2, method=method)
    expected = [0, 1, 3, 4, 6, 7]
    assert all(stay == expected for stay in report["experts"]["layers"].values()), report["experts"]["layers"]
    written = load_file(tmp_path / "out" / "dense" / "model.safetensors")
    for name in ("weight", "e_score_correction_bias"):
        key = f"model.layers.1.mlp.gate.{name}"
        assert torch.equal(written[key], weights[key][expected])


def test_scores_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_moe(tmp_path / "moe")
    first = removed(folder, tmp_path / "out", remove=0.25, method="output-error")
    path = tmp_path / "out" / "scores.safetensors"
    monkeypatch.setattr("crepe_deploy.exporting.experts.measure", None)
    again = removed(folder, tmp_path / "again", remove=0.25, method="output-error", calib=None, scores=path)
    half = removed(folder, tmp_path / "half", remove=0.5, calib=None, scores=path)
    weights = [(tmp_path / name / "dense" / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1] and again["calibration"] == first["calibration"]
    assert half["experts"]["kept"] == 4 and not half["scores"]["measured_now"] and first["scores"]["measured_now"]
    monkeypatch.setattr("crepe_deploy.exporting.experts.prove_written", None)  # nothing is written for bad scores
    with pytest.raises(ConfigError, match="another model"):
        removed(make_moe(tmp_path / "other", dtype=torch.bfloat16), tmp_path / "no", calib=None, scores=path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"scores\.safetensors"):
        removed(folder, tmp_path / "no", calib=None, scores=path)
    with pytest.raises(CheckpointError, match="no file of scores"):
        removed(folder, tmp_path / "no", calib=None, scores=folder / "model.safetensors")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("layout", "options", "error", "said"),
    [
        ("qwen3_moe", {"remove": 7}, ConfigError, r"2 of 8 experts are routed to a token; --remove 6 or 5|5 or 6"),
        ("qwen3_moe", {"remove": 0.01}, ConfigError, "is 0 experts.* would do"),
        ("qwen3_moe", {"remove": 2.5}, ConfigError, "whole number"),
        ("qwen3_moe", {"remove": -1}, ConfigError, "between 0 and 1"),
        ("qwen3_moe", {"remove": float("nan")}, ConfigError, "between 0 and 1"),
        ("deepseek_v3", {"remove": 3}, ConfigError, "all 2 groups lose equally many; --remove 2 or 4"),
        ("deepseek_v3", {"remove": 6}, ConfigError, "--remove 2 or 4 would do"),
        ("qwen3_moe", {"method": "reaper"}, ConfigError, "reap"),
        ("qwen3_moe", {"calib": None}, ConfigError, "--calib"),
        ("qwen3_moe", {"scores": "scores.safetensors"}, ConfigError, "--scores"),
        ("qwen3_moe", {"calib": None, "scores": "no.safetensors"}, CheckpointError, "no.safetensors"),
        ("qwen2_moe", {"layers": {"mlp_only_layers": [0, 1, 2]}}, UnsupportedModel, "none of its 3 layers"),
    ],
)  # fmt: skip
def test_bad_input_ends_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, options: dict[str, Any], error: type[CrepeError],
    said: str,
) -> None:  # fmt: skip
    folder = make_moe(tmp_path / "moe", layout, **options.pop("layers", {}))
    monkeypatch.setattr("crepe_deploy.exporting.experts.describe_source", None)
    with pytest.raises(error, match=said) as caught:
        removed(folder, tmp_path / "out", **options)
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_another_device_measures_the_same(tmp_path: Path) -> None:
    for layout in ("qwen3_moe", "deepseek_v3", "gpt_oss"):
        folder = make_moe(tmp_path / layout, layout)
        found = []
        with stand_in():
            for device in ("cpu", NAME):
                removed(folder, tmp_path / f"{layout}-{device[:3]}", device=device)
                found.append(load_file(tmp_path / f"{layout}-{device[:3]}" / "scores.safetensors"))
        assert found[0].keys() == found[1].keys()
        assert all(torch.equal(found[1][name], tensor) for name, tensor in found[0].items())


def test_a_model_without_experts_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'llama' has no experts that are known; mixtral"):
        removed(make_pico_llama(tmp_path / "llama"), tmp_path / "out")


def test_config_keeps_its_spelling(tmp_path: Path) -> None:
    for layout, name in (
        ("qwen3_moe", "num_experts"),
        ("mixtral", "num_local_experts"),
        ("glm4_moe", "n_routed_experts"),
    ):
        folder = make_moe(tmp_path / layout, layout)
        removed(folder, tmp_path / f"out-{layout}", remove=2)
        before, after = (
            json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / f"out-{layout}" / "dense")
        )
        assert before | {name: 6} == after and before[name] == 8
