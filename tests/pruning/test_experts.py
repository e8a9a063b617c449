"""Pruning inside experts: each matrix as a plain linear layer that reads what is routed there would be pruned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import crepe_deploy
from crepe_deploy.api.choices import choose, machine_of, shape_of
from crepe_deploy.api.inspect import inspect
from crepe_deploy.errors import ConfigError, CrepeError, UnsupportedModel
from crepe_deploy.model import inside
from crepe_deploy.model.calibrate import Collector
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.pattern import parse_pattern
from crepe_deploy.phases import Phases
from crepe_deploy.pruning import prune as pruning
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.layer import LayerPruner
from crepe_deploy.pruning.methods import METHODS
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.manifest import load_manifest, verify
from crepe_deploy.store.work import JOURNAL
from tests.moe.reference import neurons
from tests.pico import VOCAB
from tests.pico_moe import FAMILIES, fuse, make_moe

TOKENS = torch.randint(3, VOCAB, (8, 64), generator=torch.Generator().manual_seed(0))
LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "one by one": make_moe,
    "fused": lambda path: fuse(make_moe(path)),
    "fused, transposed": lambda path: make_moe(path, "gpt_oss"),
}
RUNS: dict[str, dict[str, Any]] = {
    **{f"{method} 2:4": {"method": method, "sparsity": "2:4"} for method in METHODS},
    **{f"{method} 0.5": {"method": method, "sparsity": 0.5} for method in METHODS},
    "by matrix": {"method": "wanda", "sparsity": 0.5, "granularity": "matrix"},
    "steps": {"method": "ria", "sparsity": "4:8", "feed": "pruned", "reprune": "dsnot", "reconstruct": "admm"},
}


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def plain(key: str, weight: Tensor, read: Tensor, options: dict[str, Any]) -> Tensor:
    """The weight of a linear layer that read these rows, pruned."""
    pattern = parse_pattern(str(options["sparsity"]), options.get("granularity", "row"))
    steps = {name: value for name, value in options.items() if name not in ("sparsity", "granularity")}
    config = prune_config(pattern=pattern, **steps)
    block = nn.ModuleDict({"linear": nn.Linear(*weight.shape[::-1], bias=False)})
    held = weight.clone()
    block["linear"].weight = nn.Parameter(held, requires_grad=False)
    spec = LinearSpec("linear", key, *weight.shape, False)
    collector = Collector(config.needs)
    with collector.watching(block, [spec]):
        block["linear"](read)
    decoder: Any = SimpleNamespace(blocks=[block])
    pruner = LayerPruner(decoder, config, {key: pattern}, Phases())
    pruner.prune(block, spec, {key: held}, collector.stats(spec, len(TOKENS)))
    return held


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_expert_is_pruned_as_a_plain_layer_is(tmp_path: Path, layout: str, run: str) -> None:
    folder = LAYOUTS[layout](tmp_path / "moe")
    manifest = crepe_deploy.prune(folder, tmp_path / "out", calib=TOKENS, **RUNS[run])
    model, given = stock(folder), []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: given.append(args))
    with torch.inference_mode():
        model(input_ids=TOKENS, use_cache=False)
    hidden, chosen, weights = given[0]
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for spec in inside.expert_matrices(Decoder(folder, experts=True), 0):
        rows, places = (chosen == spec.expert).nonzero(as_tuple=True)
        few = len(rows) < inside.FEWEST_TOKENS
        own = hidden if few else hidden[rows]
        counted = torch.ones(len(own), 1) if few else weights[rows, places].unsqueeze(1)
        read = (neurons(experts, spec.expert or 0, own) if spec.path.endswith("down_proj") else own) * counted
        expected = plain(spec.key, spec.of(before), read, RUNS[run])
        torch.testing.assert_close(spec.of(after), expected, atol=1e-4, rtol=1e-3)
        assert torch.equal(spec.of(after) == 0, expected == 0)
        assert manifest.tensors[spec.tensor].pattern == str(manifest.config["pattern"])


@pytest.mark.parametrize("layout", [*FAMILIES, "fused"])
def test_stock_transformers_reads_what_was_written(tmp_path: Path, layout: str) -> None:
    folder = fuse(make_moe(tmp_path / "moe")) if layout == "fused" else make_moe(tmp_path / "moe", layout)
    manifest = crepe_deploy.prune(folder, tmp_path / "out", method="wanda", sparsity="2:4", calib=TOKENS)
    verify(tmp_path / "out")
    model, tokens = stock(tmp_path / "out"), TOKENS[:1]
    with torch.inference_mode():
        experts = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
        for module in experts:
            if module.gate_up_proj.ndim == 3:
                for matrices in (module.gate_up_proj, module.down_proj):
                    assert float((matrices == 0).float().mean()) == 0.5
        assert bool(model(input_ids=tokens, use_cache=False).logits.isfinite().all())
    records = manifest.tensors
    assert manifest.metrics["sparsity_of_pruned_tensors"] == 0.5
    assert set(records) | set(manifest.dense_tensors) == set(CheckpointReader(folder).tensors)
    assert not [name for name in manifest.dense_tensors if "experts." in name and not name.endswith("bias")]
    named = {one["name"]: one for one in inspect(tmp_path / "out").to_dict()["tensors"]}
    assert all(named[name]["pattern"] == "2:4" and named[name]["pattern_from"] == "manifest" for name in records)


def test_experts_with_few_tokens_are_said_and_measured_on_their_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_moe(tmp_path / "moe")
    monkeypatch.setattr(inside, "FEWEST_TOKENS", 10**6)
    monkeypatch.setattr("crepe_deploy.pruning.records.FEWEST_TOKENS", 10**6)
    manifest = crepe_deploy.prune(folder, tmp_path / "all", method="wanda", sparsity="2:4", calib=TOKENS)
    every = {str(index): list(range(8)) for index in range(3)}
    assert manifest.metrics["experts"]["measured_on_all_tokens_of_the_layer"] == every
    assert "24 of 24 experts were routed fewer than" in manifest.metrics["limits"][0]
    name = "model.layers.0.mlp.experts.{}.gate_proj.weight"
    tokens = [manifest.tensors[name.format(expert)].notes["routed_tokens"] for expert in range(8)]
    assert sum(tokens) == 2 * TOKENS.numel()
    monkeypatch.setattr(inside, "FEWEST_TOKENS", 0)
    monkeypatch.setattr("crepe_deploy.pruning.records.FEWEST_TOKENS", 0)
    manifest = crepe_deploy.prune(folder, tmp_path / "none", method="wanda", sparsity="2:4", calib=TOKENS)
    assert manifest.metrics["experts"]["measured_on_all_tokens_of_the_layer"] == {} and "limits" not in manifest.metrics
    assert "experts" not in crepe_deploy.prune(folder, tmp_path / "no text", method="magnitude").metrics


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("feed", ["dense", "pruned"])
def test_a_stopped_run_goes_on_with_the_same_bytes(
    tmp_path: Path, layout: str, feed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = LAYOUTS[layout](tmp_path / "moe")
    options: dict[str, Any] = {"method": "wanda", "sparsity": "2:4", "calib": TOKENS, "feed": feed}
    whole = crepe_deploy.prune(folder, tmp_path / "whole", **options)
    done, prune_block = [], pruning.prune_block

    def stopping(plan: Any, index: int, *more: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        done.append(index)
        return prune_block(plan, index, *more)

    monkeypatch.setattr(pruning, "prune_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        crepe_deploy.prune(folder, tmp_path / "out", **options)
    assert done == [0, 1] and (tmp_path / "out.work" / JOURNAL).is_file()
    monkeypatch.setattr(
        pruning, "prune_block", lambda plan, index, *more: done.append(index) or prune_block(plan, index, *more)
    )
    again = crepe_deploy.prune(folder, tmp_path / "out", resume=True, **options)
    assert done == [0, 1, 2] and again.files == whole.files and again.tensors == whole.tensors


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"recipe": "best"}, ConfigError, "--feed both does not walk through experts"),
        ({"method": "wanda", "reconstruct": "admm"}, ConfigError, "--feed pruned"),
        ({"method": "ria", "allocate": "owl"}, ConfigError, "--allocate does not look inside experts"),
        ({"method": "ria", "permute": "fold"}, UnsupportedModel, "--permute fold does not know"),
        ({"method": "ria", "exclude": "."}, ConfigError, "leave nothing to prune"),
    ],
)
def test_what_does_not_look_inside_is_refused_before_any_work(
    tmp_path: Path, options: dict[str, Any], error: type[CrepeError], words: str
) -> None:
    with pytest.raises(error, match=words):
        crepe_deploy.prune(make_moe(tmp_path / "moe"), tmp_path / "out", sparsity="2:4", calib=TOKENS, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_experts_may_be_left_whole(tmp_path: Path) -> None:
    """Then every step that knows linear layers works."""
    options = {"reconstruct": "admm", "exclude": r"[.]experts[.]", "calib": TOKENS}
    manifest = crepe_deploy.prune(make_moe(tmp_path / "moe"), tmp_path / "out", method="ria", sparsity="2:4", **options)
    assert len(manifest.tensors) == 3 * 4 and manifest.config["feed"] == "both"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "out"))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if ".experts." in name)


@pytest.mark.parametrize("options", [{"format": "packed"}, {"format": "int8"}, {"format": "dense", "heal": 0.01}])
def test_exports_and_training_refuse_before_pruning(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crepe_deploy.exporting.pipeline.prune_into", None)
    text = tmp_path / "text.txt"
    text.write_text("the state of the city and the world " * 200, encoding="utf-8")
    windows: dict[str, Any] = {"calib_samples": 4, "calib_length": 16}
    with pytest.raises(UnsupportedModel, match="the dense folders of both load wherever the model does"):
        crepe_deploy.prune_and_export(
            make_moe(tmp_path / "moe"),
            tmp_path / "out",
            method="wanda",
            sparsity="2:4",
            calib=text,
            **windows,
            **options,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dense_export_counts_again(tmp_path: Path, layout: str) -> None:
    folder = LAYOUTS[layout](tmp_path / "moe")
    options: dict[str, Any] = {"method": "wanda", "sparsity": 0.5, "granularity": "matrix", "calib": TOKENS}
    crepe_deploy.prune_and_export(folder, tmp_path / "out", format="dense", **options)
    crepe_deploy.export(tmp_path / "out" / "dense", tmp_path / "again", format="dense")
    assert load_manifest(tmp_path / "again").tensors == load_manifest(tmp_path / "out" / "dense").tensors
    crepe_deploy.prune(folder, tmp_path / "groups", method="magnitude", sparsity="2:4")
    for refused in ("packed", "int8"):
        with pytest.raises(UnsupportedModel, match="experts"):
            crepe_deploy.export(tmp_path / "groups", tmp_path / "no", format=refused)


def test_what_is_left_out_is_chosen_as_it_works_inside_experts(tmp_path: Path) -> None:
    from crepe_deploy.api.choices import Given

    shape = shape_of(Decoder(make_moe(tmp_path / "moe"), experts=True))
    chosen = choose(Given(target="cpu", calib=True), machine_of(), shape)
    assert shape.experts and not shape.packable and 32 in shape.widths
    assert chosen["feed"] == "pruned" and chosen["reconstruct"] == "admm" and "packed" not in chosen["format"]
    assert not {"permute", "rescale", "recipe"} & chosen.keys()
    manifest = crepe_deploy.prune(tmp_path / "moe", tmp_path / "out", calib=TOKENS)
    assert manifest.config["feed"] == "pruned" and manifest.config["pattern"] == "16:32"
