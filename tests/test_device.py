"""`--device`: what is refused, what is said, and commands on a stand-in for a GPU (see `tests.stand_in`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crepe_deploy import cli, device
from crepe_deploy.api.evaluate import evaluate
from crepe_deploy.api.experts import experts
from crepe_deploy.api.heal import heal
from crepe_deploy.api.inputs import find_model, windows_of
from crepe_deploy.api.prune import prune
from crepe_deploy.api.search import search
from crepe_deploy.errors import ConfigError
from crepe_deploy.healing import heal as healing
from crepe_deploy.pattern import parse_pattern
from crepe_deploy.select import select
from tests.pico import VOCAB, make_pico_llama
from tests.pico_moe import make_moe
from tests.stand_in import NAME, PLACE, MixedDevicesError, stand_in


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("model") / "m")


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.resolve("cpu") == device.resolve("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:1", "gpu", "cuda:x", ""):
        with pytest.raises(ConfigError, match="there is no such device here; there is: cpu, torch sees no GPU"):
            device.resolve(name)
    monkeypatch.setattr(device, "devices", lambda: ["cpu", "cuda:0", "cuda:1"])
    assert device.resolve("auto") == device.resolve("cuda") == torch.device("cuda:0")
    assert device.resolve("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="there is: cpu, cuda:0, cuda:1"):
        device.resolve("cuda:2")


def test_where_hidden_states_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "free_bytes", lambda _: 1 << 30)
    gpu = torch.device("cuda:0")
    assert device.resting_place(gpu, 1 << 26) == gpu
    assert device.resting_place(gpu, (1 << 26) + 1) == device.CPU
    assert device.resting_place(device.CPU, 1 << 40) == device.CPU


@pytest.mark.parametrize(
    "command",
    [
        "prune {model} --calib {text} --out {out}",
        "prune-and-export {model} --calib {text} --out {out}",
        "search {model} --calib {text} --text {text} --out {out}.json",
        "tyr {model} --calib {text} --out {out}",
        "eval {model} --text {text}",
        "heal {model} --dense {model} --text {text} --out {out}",
        "plan {model}",
    ],
)
def test_a_device_that_is_not_there_is_refused_before_any_work(
    tmp_path: Path, model: Path, text: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = command.format(model=model, text=text, out=tmp_path / "out").split()
    assert cli.run([*typed, "--device", "cuda:7"]) == 2
    assert "--device cuda:7: there is no such device here; there is: cpu" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_auto_says_what_it_came_to(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["eval", str(model), "--text", str(text), "--max-tokens", "64", "--window", "32"]) == 0
    assert capsys.readouterr().err.count("computing on cpu") == 1
    assert cli.run(["plan", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "cpu"


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    with stand_in() as place:
        there = torch.ones(2, 3, device=place)
        assert (there + 1).device == PLACE
        for mixed in (
            lambda: there + torch.ones(2, 3),
            lambda: there @ torch.ones(3, 2),
            lambda: there[torch.ones(1).long()],
        ):
            with pytest.raises(MixedDevicesError):
                mixed()
        with pytest.raises(TypeError):
            there.numpy()
        assert torch.equal(there.cpu(), torch.ones(2, 3))


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "16:32", "0.3", "0.5", "0.9"])
@pytest.mark.parametrize("granularity", ["row", "matrix"])
def test_masks_of_equal_scores_are_equal(pattern: str, granularity: Any) -> None:
    """Ties, infinities and negative zeros among them."""
    draws = torch.Generator().manual_seed(0)
    scores = [
        torch.randn(24, 64, generator=draws),
        torch.randint(3, (24, 64), generator=draws).float(),
        torch.randint(2, (24, 64), generator=draws).float() * -0.0,
        torch.randint(-1, 2, (24, 64), generator=draws).float() * float("inf"),
        torch.randn(64, 24, generator=draws).double().T,
    ]
    parsed = parse_pattern(pattern, granularity)
    for score in scores:
        score = score.nan_to_num(0.0, float("inf"), float("-inf"))
        expected = select(score, parsed)
        with stand_in() as place:
            found = select(score.to(place), parsed)
            assert found.device == place
            assert torch.equal(found.cpu(), expected)


def test_prune_says_where_it_computed(tmp_path: Path, model: Path, text: Path) -> None:
    said: list[str] = []
    with stand_in():
        manifest = prune(model, tmp_path / "out", calib=text, calib_samples=4, calib_length=32, say=said.append)
    assert f"computing on {NAME}" in said
    assert manifest.metrics["device"] == NAME


@pytest.mark.parametrize("optimizer", ["pho", "hill-climb"])
def test_search(tmp_path: Path, model: Path, text: Path, optimizer: Any) -> None:
    def run(out: Path) -> dict[str, Any]:
        return search(
            model, out, calib=text, text=text, calib_samples=4, calib_length=32, text_samples=1, text_length=32,
            optimizer=optimizer, evaluations=3, fit=3, finalists=1, workers=1, kernels=[3, 5],
        )  # fmt: skip

    expected = run(tmp_path / "cpu.json")
    with stand_in():
        found = run(tmp_path / "device.json")
    assert found["params"] == expected["params"]
    assert found["provenance"]["result"] == pytest.approx(expected["provenance"]["result"], rel=1e-5)


def test_eval(model: Path, text: Path, tmp_path: Path) -> None:
    other = make_pico_llama(tmp_path / "other", seed=1)

    def run() -> dict[str, Any]:
        return evaluate(model, text=text, window=32, max_tokens=128, against=other).to_dict()

    expected = run()
    with stand_in():
        found = run()
    assert found["convention"]["device"] == NAME
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)
    assert found["paired"]["kl_mean"] == pytest.approx(expected["paired"]["kl_mean"], rel=1e-4)


def test_heal(tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = tmp_path / "pruned"
    prune(model, pruned, method="magnitude")

    def run(out: Path) -> dict[str, torch.Tensor]:
        heal(pruned, out, dense=model, text=text, steps=10, window=32, batch_tokens=64, learning_rate=1e-3)
        return load_file(out / "model.safetensors")

    expected = run(tmp_path / "cpu")
    made = healing.accelerator_on

    def on_the_stand_in(place: torch.device) -> Any:
        accelerator = made(device.CPU)
        accelerator.state.device = place
        return accelerator

    monkeypatch.setattr(healing, "accelerator_on", on_the_stand_in)
    try:
        with stand_in():
            found = run(tmp_path / "device")
    finally:
        made(device.CPU).state.device = device.CPU
    for name, tensor in expected.items():
        assert torch.equal(found[name] == 0, tensor == 0), name
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-3)


def test_a_gpu_that_is_too_small_is_no_defect(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fill)
    assert cli.run(["eval", str(model), "--text", str(text), "--max-tokens", "64", "--window", "32"]) == 1
    assert "error: the GPU has too little memory for this" in capsys.readouterr().err


def test_text_of_the_models_own(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def run() -> torch.Tensor:
        return windows_of(find_model(model), "self", "text", 2, 8, 0, device=device.resolve("auto")).tokens

    expected = run()
    with stand_in():
        assert torch.equal(run(), expected)
    assert len(list(tmp_path.rglob("self/*.json"))) == 2  # what rounding decides is kept by device


@pytest.mark.parametrize("layout", ["mixtral", "deepseek_v3"])
def test_experts(tmp_path: Path, layout: str) -> None:
    tokens = torch.randint(3, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    folder = make_moe(tmp_path / "moe", layout)
    expected = experts(folder, tmp_path / "cpu", calib=tokens, remove=0.25)
    with stand_in():
        found = experts(folder, tmp_path / "device", calib=tokens, remove=0.25)
    assert found["experts"]["layers"] == expected["experts"]["layers"]
