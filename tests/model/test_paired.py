"""`--feed both`: statistics of the dense and the pruned model side by side, and what they bring."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.calibrate import Stream, embed
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.families import FAMILIES
from crepe_deploy.model.paired import RIDGE, Pair, Side, residuals_of
from crepe_deploy.model.proof import walk_logits
from crepe_deploy.model.stats import Stats
from crepe_deploy.pattern import NM
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.pruning.steps.reconstruct import Admm, Exact, make_goal, solve_masked
from crepe_deploy.select import select
from crepe_deploy.store.sources import resolve_model
from tests.pico import VOCAB, make_pico, make_pico_llama, sample_text
from tests.pruning.test_prune import CONFIGS, VARIANTS, windows


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(sample_text(3000), encoding="utf-8")
    return path


def seen(model: tf.PreTrainedModel, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What modules of a stock model read, (tokens, width)."""
    found: dict[str, Tensor] = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: found.update({name: (args or tuple(kwargs.values()))[0].flatten(0, 1)}),
            with_kwargs=True,
        )
    with torch.inference_mode():
        model(tokens)
    return found


def test_the_statistics_are_those_of_two_stock_models(tmp_path: Path) -> None:
    """Both models whole and dense in transformers, the second with noise in its weights."""
    first, second = (make_pico_llama(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    tokens = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(1))
    decoders = [Decoder(folder) for folder in (first, second)]
    streams = [embed(decoder, [tokens])[0] for decoder in decoders]
    pair = Pair(Side(streams[0]), Side(streams[1]), FAMILIES["llama"].residuals)
    paths = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm", "mlp.up_proj": None}
    names = ["model.layers.1", "model.layers.1.post_attention_layernorm"]
    names += [f"model.layers.1.{path}" for path in paths]
    stock = [seen(tf.AutoModelForCausalLM.from_pretrained(folder).eval(), tokens, names) for folder in (first, second)]
    with decoders[0].block(0) as (before, _), decoders[1].block(0) as (block, _):
        pair.advance(before, block, 0)
    with decoders[0].block(1) as (before, _), decoders[1].block(1) as (block, _):
        groups = pair.groups(block, 1, decoders[1].linears[1], decoders[1].linears[1])
        assert [[spec.path.split(".")[1][0] for spec in group] for group in groups] == [
            ["q", "k", "v"], ["o"], ["g", "u"], ["d"],
        ]  # fmt: skip
        for group in groups:
            path = group[-1].path
            if path not in paths:
                continue
            stats = pair.stats(before, block, 1, group)
            dense, pruned = (found[f"model.layers.1.{path}"] for found in stock)
            check(stats, dense, pruned, sequences=3)
            residual = paths[path]
            if residual is None:
                assert stats.drift is None
            else:
                lost = [found[".".join(filter(None, ["model.layers.1", residual]))] for found in stock]
                torch.testing.assert_close(stats.drift, 2 / 3 * (lost[0] - lost[1]).T @ pruned, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", [*CONFIGS, *VARIANTS])
def test_replaying_finished_parts_changes_nothing(tmp_path: Path, family: str) -> None:
    """Every family: with groups in order and weights changed in between, a pair that never replays sees the same."""
    decoder = Decoder(make_pico(tmp_path / "m", {**CONFIGS, **VARIANTS}[family]))
    tokens = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(1))
    stream = embed(decoder, [tokens])[0]
    pair = Pair.start(stream, decoder.config)
    assert len(pair.residuals) == 2
    for index in range(2):
        with decoder.block(index) as (block, _), torch.inference_mode():
            before = copy.deepcopy(block)
            for group in pair.groups(block, index, decoder.linears[index], decoder.linears[index]):
                fresh = Pair(Side(copy.copy(pair.dense.stream)), Side(copy.copy(pair.pruned.stream)), pair.residuals)
                found, wanted = (each.stats(before, block, index, group) for each in (pair, fresh))
                for name in ("col_norm", "hessian", "cross", "drift"):
                    torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=0)
                for spec in group:
                    block.get_submodule(spec.path).weight.mul_(0.9)
            sides = [Stream(list(side.stream.hidden), side.stream.calls) for side in (pair.dense, pair.pruned)]
            pair.advance(before, block, index)
            for side, plain, module in zip((pair.dense, pair.pruned), sides, (before, block), strict=True):
                plain.run(module, index, advance=True)
                torch.testing.assert_close(side.stream.hidden, plain.hidden, rtol=0, atol=0)
            assert not torch.equal(pair.dense.stream.hidden[0], pair.pruned.stream.hidden[0])


WRITERS = {  # layers that write to the stream -> the stream before that: what a module reads, and what others put out
    "llama": {"self_attn.o_proj": [""], "mlp.down_proj": ["post_attention_layernorm"]},
    "gemma2": {"self_attn.o_proj": [""], "mlp.down_proj": ["pre_feedforward_layernorm"]},
    "gemma3_text": {"self_attn.o_proj": [""], "mlp.down_proj": ["pre_feedforward_layernorm"]},
    "opt": {"self_attn.out_proj": [""], "fc2": ["final_layer_norm"]},
    "opt, norms after": {"self_attn.out_proj": [""], "fc2": ["fc1"]},
    "gpt_neox": {"attention.dense": [""], "mlp.dense_4h_to_h": ["", "attention.dense"]},
    "gpt_neox, one after the other": {"attention.dense": [""], "mlp.dense_4h_to_h": ["post_attention_layernorm"]},
    "gpt2": {"attn.c_proj": [""], "mlp.c_proj": ["ln_2"]},
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_drift_is_that_of_the_stream_in_two_stock_models(tmp_path: Path, name: str) -> None:
    """Where a norm lies behind the layer, in units of what it makes of the dense model's output."""
    config = {**CONFIGS, **VARIANTS}[name]
    folders = [make_pico(tmp_path / str(seed), config, seed=seed) for seed in (0, 1)]
    tokens = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(1))
    decoders = [Decoder(folder) for folder in folders]
    first, second = (Side(embed(decoder, [tokens])[0]) for decoder in decoders)
    pair, path_of_block = Pair(first, second, residuals_of(config)), f"{decoders[0].blocks_path}.1"
    with decoders[0].block(0) as (before, _), decoders[1].block(0) as (block, _):
        pair.advance(before, block, 0)
    stock = [
        record(tf.AutoModelForCausalLM.from_pretrained(folder).eval(), tokens, path_of_block) for folder in folders
    ]
    (reads, puts), (others, other_puts) = stock
    with decoders[0].block(1) as (before, _), decoders[1].block(1) as (block, _):
        for group in pair.groups(block, 1, decoders[1].linears[1], decoders[1].linears[1]):
            path = group[-1].path
            stats = pair.stats(before, block, 1, group)
            if path not in WRITERS[name]:
                assert stats.drift is None
                continue
            stream, *beside = WRITERS[name][path]
            lost = reads[stream] - others[stream] + sum(puts[part] - other_puts[part] for part in beside)
            dense, pruned = reads[path], others[path]
            norm = next(entry.norm for entry in pair.residuals if entry.path == path)
            if norm:
                output, gain = puts[path], before.get_submodule(norm).get_parameter("weight") + 1
                scale = (output.square().mean(1, keepdim=True) + 1e-6).rsqrt()
                torch.testing.assert_close(before.get_submodule(norm)(output), output * scale * gain)
                dense, pruned, lost = dense * scale, pruned * scale, lost * gain / (gain.square() + RIDGE)
            torch.testing.assert_close(stats.hessian, 2 / 3 * pruned.T @ pruned, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(stats.cross, 2 / 3 * dense.T @ pruned, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(stats.drift, 2 / 3 * lost.T @ pruned, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(stats.variance, others[path].var(0, correction=0), atol=1e-3, rtol=1e-3)


def record(model: tf.PreTrainedModel, tokens: Tensor, block: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the modules of a block read, and what its linear layers put out: (tokens, width) by path in the block."""
    reads: dict[str, Tensor] = {}
    puts: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if given is not None:
                reads[name] = given.flatten(0, -2)
            if isinstance(output, Tensor):
                puts[name] = output.flatten(0, -2)

        return note

    for name, module in model.get_submodule(block).named_modules():
        module.register_forward_hook(hook(name), with_kwargs=True)
    with torch.inference_mode():
        model(tokens)
    return reads, puts


@pytest.mark.parametrize("family", [*CONFIGS, *VARIANTS])
def test_layers_whose_part_ends_in_a_dense_layer_aim_at_their_own_output(tmp_path: Path, family: str) -> None:
    """Nothing would make up for their fits: gate and up of SmolLM2 fitted to the dense outputs end in noise."""
    decoder = Decoder(make_pico(tmp_path / "m", {**CONFIGS, **VARIANTS}[family]))
    stream = embed(decoder, [torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))])[0]
    pair = Pair.start(stream, decoder.config)
    specs = decoder.linears[0]
    with decoder.block(0) as (block, _):
        called = [spec for group in pair.groups(block, 0, specs, specs) for spec in group]
        assert pair.own == frozenset()
        last = called[-1]
        groups = pair.groups(block, 0, specs, [spec for spec in specs if spec != last])
        assert [spec for group in groups for spec in group] == called[:-1]
        part = last.path.rpartition(".")[0]
        assert pair.own == {spec.path for spec in called[:-1] if spec.path.rpartition(".")[0] == part} != frozenset()
        for group in groups:
            stats = pair.stats(block, block, 0, group)
            assert (stats.cross is None) == (group[0].path in pair.own)


def check(stats: Stats, dense: Tensor, pruned: Tensor, sequences: int) -> None:
    wanted = Stats(
        col_norm=(dense.square().sum(0) / sequences).sqrt(),
        hessian=2 / sequences * pruned.T @ pruned,
        total=pruned.sum(0) / sequences,
        variance=pruned.var(0, correction=0),
        cross=2 / sequences * dense.T @ pruned,
    )
    for name in ("col_norm", "hessian", "total", "variance", "cross"):
        torch.testing.assert_close(getattr(stats, name), getattr(wanted, name), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("drift", [False, True])
def test_exact_with_a_dense_goal_is_least_squares_row_by_row(drift: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(300, 32, generator=generator)
    pruned = dense + 0.3 * torch.randn(300, 32, generator=generator)
    weight, lost = torch.randn(6, 32, generator=generator), torch.randn(300, 6, generator=generator)
    stats = Stats(
        hessian=pruned.T @ pruned, cross=dense.T @ pruned, drift=lost.T @ pruned if drift else None
    )  # fmt: skip
    mask = select(weight.abs(), NM(2, 4))
    found = Exact(damping=1e-7, tolerance=1e-6, max_steps=1000)(weight, weight, mask, stats, NM(2, 4)).weight
    wanted = dense @ weight.T + (lost if drift else 0)
    for row in range(6):
        kept = mask[row]
        expected = torch.linalg.lstsq(pruned[:, kept].double(), wanted[:, row : row + 1].double()).solution.squeeze(1)
        torch.testing.assert_close(found[row, kept].double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(16, 32)], ids=str)
@pytest.mark.parametrize("crossed", [False, True])
def test_admm_finds_better_masks_and_no_row_gets_worse(pattern: NM, crossed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator) / 8 + torch.eye(64)
    inputs = torch.randn(400, 64, generator=generator) @ mixing
    weight = torch.randn(32, 64, generator=generator)
    cross = (inputs + 0.2 * torch.randn(400, 64, generator=generator)).T @ inputs if crossed else None
    stats = Stats(hessian=inputs.T @ inputs, cross=cross)
    mask = select(weight.abs() * inputs.norm(dim=0), pattern)
    solution = Admm()(weight, weight, mask, stats, pattern)
    assert (solution.mask.view(32, -1, pattern.m).sum(-1) == pattern.n).all()
    assert not solution.weight[~solution.mask].any()
    assert solution.notes["mask_moved"] > 0
    goal = make_goal(weight, stats, 0.01)
    assert (goal.error(solution.weight) <= goal.error(weight * mask)).all()
    fixed = solve_masked(goal, weight * mask, mask, 1e-5, 500)[0]
    assert goal.error(solution.weight).sum() < goal.error(fixed).sum()


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_paired(tmp_path: Path, text: Path, family: str) -> None:
    model = make_pico(tmp_path / "m", CONFIGS[family])
    calibration = windows(model, text, samples=8, length=48)
    dense, distance = walk_logits(Decoder(model), calibration.tokens), {}
    for feed in ("dense", "both"):
        config = prune_config("ria", "2:4", feed=feed, reconstruct="exact")
        manifest = prune(resolve_model(str(model)), tmp_path / feed, config, calibration)
        assert manifest.metrics["sparsity_of_pruned_tensors"] == pytest.approx(0.5, abs=1e-3)
        logits = walk_logits(Decoder(tmp_path / feed), calibration.tokens)
        distance[feed] = float((logits - dense).square().mean())
    assert distance["both"] < distance["dense"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "opt", "gpt_neox", *VARIANTS])
def test_correcting_the_stream_brings_the_logits_closer(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = make_pico(tmp_path / "m", {**CONFIGS, **VARIANTS}[name])
    calibration = windows(model, text, samples=16, length=48)
    dense, distance = walk_logits(Decoder(model), calibration.tokens), {}
    config = prune_config("ria", NM(2, 4), feed="both", reconstruct="exact")
    kind = Decoder(model).config.model_type
    for what in ("whole", "halved"):
        if what == "halved":
            monkeypatch.setitem(FAMILIES, kind, replace(FAMILIES[kind], residuals=()))
        manifest = prune(resolve_model(str(model)), tmp_path / what, config, calibration)
        assert ("limits" in manifest.metrics) == (what == "halved")
        distance[what] = float((walk_logits(Decoder(tmp_path / what), calibration.tokens) - dense).square().mean())
    assert distance["whole"] < distance["halved"]


def test_both_without_reconstruction_is_refused(tmp_path: Path, text: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    with pytest.raises(ConfigError, match="what only --reconstruct, --repair and the sweep of --values use"):
        prune(
            resolve_model(str(model)), tmp_path / "out", prune_config("ria", "2:4", feed="both"), windows(model, text)
        )
