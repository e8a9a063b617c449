"""The search's parts on models: the judge against explicit models, accumulation, levels, the supernet on disk."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from crepe_deploy.errors import ConfigError, UnsupportedModel, VerifyError
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.progress import Meter, silent
from crepe_deploy.structural.accumulate import level_shares, mean_weight
from crepe_deploy.structural.allocate import best, flap_allocation, flap_scores
from crepe_deploy.structural.build import Builder
from crepe_deploy.structural.evolve import brood, ladders
from crepe_deploy.structural.fitness import FitnessJudge, cache_bytes, dense_reference, top_k_divergence
from crepe_deploy.structural.levels import Level, LocalRules
from crepe_deploy.structural.narrow import narrowed, output_specs, require_family
from crepe_deploy.structural.plan import Geometry
from crepe_deploy.structural.stages import iteration_levels
from crepe_deploy.structural.stored import StoredPlans
from crepe_deploy.structural.supernet import Store, planned_bytes
from crepe_deploy.structural.units import Allocation, Units, Width, even, plan_budget
from tests.pico import VOCAB, make_pico, make_pico_llama
from tests.structural.random_plans import CONFIGS, make_model

LAYERS = 3


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pico") / "model"
    return make_pico_llama(folder, num_hidden_layers=LAYERS, num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB, (4, 24), generator=torch.Generator().manual_seed(7))


def units_of(decoder: Decoder) -> Units:
    return Units(Geometry.from_config(decoder.config), 16, "groups")


def built(
    decoder: Decoder, tokens: Tensor, folder: Path, accumulation: str = "expectation"
) -> tuple[Store, Allocation]:
    units = units_of(decoder)
    start = even(units, plan_budget(units, 0.4))
    store = Store(folder)
    builder = Builder(decoder, units.geometry, tokens, LocalRules(), lambda _: None, Meter(silent, 0))
    builder.build(iteration_levels(units, start, 0), store, accumulation)
    return store, start


def masked_model(folder: Path, store: Store, widths: tuple[Width, ...]) -> torch.nn.Module:
    """The dense transformers model with the levels' refit weights in place and zeros elsewhere."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    for index, (layer, width) in enumerate(zip(model.model.layers, widths, strict=True)):
        for module, level in (
            (layer.self_attn.o_proj, store.attention(index, (width.groups, width.queries))),
            (layer.mlp.down_proj, store.neurons(index, width.neurons)),
        ):
            module.weight.data = level.full(module.in_features)
    return model


@torch.inference_mode()
def explicit_fitness(dense: torch.nn.Module, masked: torch.nn.Module, tokens: Tensor, k: int) -> float:
    """KL over the dense top k, from whole softmaxes of whole models, position by position."""
    reference, found = (model(input_ids=tokens, use_cache=False).logits for model in (dense, masked))
    total = 0.0
    for row, other in zip(reference.reshape(-1, VOCAB), found.reshape(-1, VOCAB), strict=True):
        chosen = row.topk(k).indices
        p, q = row[chosen].softmax(0), other[chosen].softmax(0)
        total += float((p * (p / q).log()).sum())
    return total / tokens.numel()


def test_the_judge_agrees_with_masked_models_and_shares_prefixes(pico: Path, tokens: Tensor, tmp_path: Path) -> None:
    decoder = Decoder(pico)
    store, start = built(decoder, tokens, tmp_path)
    units = units_of(decoder)
    rungs = ladders(units, start, 1, 1)
    children = brood(start, rungs, 6, random.Random(0))
    candidates = [units.widths(each) for each in (start, *children)]
    judge = FitnessJudge(decoder, units.geometry, dense_reference(decoder, tokens, "logits", 32), store)
    values = judge(candidates, [0, 2, 3])
    dense = AutoModelForCausalLM.from_pretrained(str(pico), dtype=torch.float32).eval()
    for widths, value in zip(candidates, values, strict=True):
        expected = explicit_fitness(dense, masked_model(pico, store, widths), tokens[[0, 2, 3]], 32)
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert judge(candidates[:1], [0, 2, 3]) == pytest.approx(values[:1], rel=1e-6)
    distinct = {candidate[: index + 1] for candidate in candidates for index in range(LAYERS)}
    assert judge.blocks_run == len(distinct) + LAYERS
    assert judge.blocks_alone == (len(candidates) + 1) * LAYERS


def test_hidden_states_as_fitness_are_zero_for_the_dense_model_alone(
    pico: Path, tokens: Tensor, tmp_path: Path
) -> None:
    decoder = Decoder(pico)
    units = units_of(decoder)
    full = Allocation((4,) * LAYERS, (8,) * LAYERS)
    store = Store(tmp_path)
    Builder(decoder, units.geometry, tokens, LocalRules(), lambda _: None, Meter(silent, 0)).build(
        iteration_levels(units, full, 0), store, "none"
    )
    judge = FitnessJudge(decoder, units.geometry, dense_reference(decoder, tokens, "hidden", 1), store)
    narrow = Allocation((4, 4, 3), (8,) * LAYERS)
    dense, less = judge([units.widths(full), units.widths(narrow)], [0, 1])
    assert dense == pytest.approx(0, abs=1e-9) and less > 1e-3


def test_divergence_in_the_whole_vocabulary_is_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, other = torch.randn(2, 5, 40, generator=generator)
    values, indices = dense.topk(40)
    likely = torch.log_softmax(values, -1)
    expected = torch.nn.functional.kl_div(
        other.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert top_k_divergence(other, indices.int(), likely) == pytest.approx(float(expected), rel=1e-5)
    assert top_k_divergence(dense, indices.int(), likely) == pytest.approx(0, abs=1e-6)


def test_memory_is_planned_as_it_is_taken(pico: Path, tokens: Tensor) -> None:
    decoder = Decoder(pico)
    reference = dense_reference(decoder, tokens, "logits", 10)
    assert reference.indices is not None and reference.likely is not None
    taken = reference.indices.nbytes + reference.likely.nbytes
    assert taken == cache_bytes(decoder, tokens, "logits", 10)
    hidden = dense_reference(decoder, tokens, "hidden", 10).hidden
    assert sum(states.nbytes for states in hidden.values()) == cache_bytes(decoder, tokens, "hidden", 10)
    with pytest.raises(ConfigError, match="logits, hidden"):
        cache_bytes(decoder, tokens, "perplexity", 10)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_narrowed_block_computes_what_the_masked_one_does_and_comes_back(
    tmp_path: Path, tokens: Tensor, family: str
) -> None:
    folder = make_model(tmp_path / family, family, intermediate_size=64, num_key_value_heads=2)
    decoder = Decoder(folder)
    units = units_of(decoder)
    store = Store(tmp_path / "levels")
    start = Allocation((1, 1, 2), (3, 2, 4))
    Builder(decoder, units.geometry, tokens, LocalRules(), lambda _: None, Meter(silent, 0)).build(
        iteration_levels(units, start, 0), store, "expectation"
    )
    widths = units.widths(start)
    judge = FitnessJudge(decoder, units.geometry, dense_reference(decoder, tokens, "logits", 64), store)
    dense = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    expected = explicit_fitness(dense, masked_model(folder, store, widths), tokens, 64)
    assert judge([widths], range(4))[0] == pytest.approx(expected, rel=1e-3)
    with decoder.block(0) as (block, _):
        before = {name: parameter.data_ptr() for name, parameter in block.named_parameters()}
        state = dict(vars(block.self_attn))
        with narrowed(block, StoredPlans(store, widths)[0], units.geometry):
            assert block.self_attn.o_proj.weight.shape == (64, 32) and block.mlp.down_proj.weight.shape == (64, 48)
            rows = {"qkv_proj": 48} if family == "phi3" else {"q_proj": 32, "k_proj": 8, "v_proj": 8}
            for name, size in rows.items():
                assert {part.shape[0] for part in block.self_attn.get_submodule(name).parameters()} == {size}
        assert {name: parameter.data_ptr() for name, parameter in block.named_parameters()} == before
        assert vars(block.self_attn) == state and block.self_attn.num_key_value_groups == 4


def test_the_mean_weight_gives_the_mean_output() -> None:
    """Eq. 5 on explicit outputs: sum of (1 - S_e) X W_e over sum of (1 - S_e)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 12, generator=generator)
    found = []
    for kept in (3, 6, 12):
        columns = torch.randperm(12, generator=generator)[:kept].sort().values
        found.append(Level(columns, torch.randn(5, kept, generator=generator)))
    shares = level_shares([3, 6, 12], 1, "expectation")
    outputs = [x[:, level.columns] @ level.weight.T for level in found]
    expected = sum((kept / 12) * out for kept, out in zip((3, 6, 12), outputs, strict=True)) / (21 / 12)
    torch.testing.assert_close(x @ mean_weight(found, shares, 12).T, expected, rtol=1e-5, atol=1e-5)
    single = mean_weight(found, level_shares([3, 6, 12], 1, "single"), 12)
    torch.testing.assert_close(single, found[1].full(12))
    assert level_shares([3, 6, 12], 1, "uniform") == pytest.approx([1 / 3] * 3)
    with pytest.raises(ConfigError, match="expectation, uniform, single"):
        level_shares([3], 0, "none")


def test_accumulation_changes_what_later_layers_are_fitted_to(pico: Path, tokens: Tensor, tmp_path: Path) -> None:
    decoder = Decoder(pico)
    stores = {how: built(decoder, tokens, tmp_path / how, how)[0] for how in ("expectation", "none")}
    first, last = ([stores[how].neurons(index, 64).weight for how in stores] for index in (0, LAYERS - 1))
    assert torch.equal(*first) and not torch.allclose(*last, atol=1e-3)


def test_the_levels_of_a_layer_fit_the_inputs_behind_the_mean(pico: Path, tokens: Tensor, tmp_path: Path) -> None:
    """With "single" the second layer's Hessian must be that of a model whose first layer has the centre level."""
    decoder = Decoder(pico)
    store, start = built(decoder, tokens, tmp_path, "single")
    units = units_of(decoder)
    model = AutoModelForCausalLM.from_pretrained(str(pico), dtype=torch.float32).eval()
    width = units.widths(start)[0]
    first = model.model.layers[0]
    first.self_attn.o_proj.weight.data = store.attention(0, (width.groups, width.queries)).full(64)
    first.mlp.down_proj.weight.data = store.neurons(0, width.neurons).full(128)
    seen: list[Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    gram = (seen[0].T @ seen[0]).double() * 2 / len(tokens)
    gram.diagonal().add_(0.01 * float(gram.diagonal().mean()))
    weight = model.model.layers[1].mlp.down_proj.weight.data.double()
    level = store.neurons(1, units.widths(start)[1].neurons)
    wanted = torch.linalg.solve(gram[level.columns][:, level.columns], (gram @ weight.T)[level.columns]).T
    torch.testing.assert_close(level.weight.double(), wanted, rtol=1e-2, atol=1e-3)


def test_the_supernet_keeps_kept_columns_within_what_was_planned(pico: Path, tokens: Tensor, tmp_path: Path) -> None:
    decoder = Decoder(pico)
    store, start = built(decoder, tokens, tmp_path)
    wanted = iteration_levels(units_of(decoder), start, 0)
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert taken <= planned_bytes(Geometry.from_config(decoder.config), wanted, 4)
    again = Store(tmp_path)
    for index, layer in enumerate(wanted):
        assert again.damage(index, layer) is None
        for size in layer.neurons:
            level, fresh = store.neurons(index, size), again.neurons(index, size)
            assert torch.equal(level.columns, fresh.columns) and torch.equal(level.weight, fresh.weight)


def test_a_damaged_level_is_named_and_rebuilt_to_the_same(pico: Path, tokens: Tensor, tmp_path: Path) -> None:
    decoder = Decoder(pico)
    _, start = built(decoder, tokens, tmp_path)
    victim = tmp_path / "layer-0001" / "ffn-64.safetensors"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    data = bytearray(before[victim])
    data[-1] ^= 1
    victim.write_bytes(bytes(data))
    with pytest.raises(VerifyError, match=r"ffn-64\.safetensors differs.*--resume rebuilds"):
        Store(tmp_path).neurons(1, 64)
    said: list[str] = []
    units = units_of(decoder)
    Builder(decoder, units.geometry, tokens, LocalRules(), said.append, Meter(silent, 0)).build(
        iteration_levels(units, start, 0), Store(tmp_path), "expectation"
    )
    assert len(said) == 1 and str(victim) in said[0]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


def test_flap_gives_the_best_units_within_each_budget(pico: Path, tokens: Tensor) -> None:
    assert best([torch.tensor([5.0, 1.0]), torch.tensor([4.0, 3.0, 2.0])], 4) == (1, 3)
    assert best([torch.tensor([0.0, 0.0])] * 3, 3) == (1, 1, 1)
    decoder = Decoder(pico)
    units = units_of(decoder)
    budget = plan_budget(units, 0.4)
    scores = flap_scores(decoder, tokens)
    found = flap_allocation(scores, units, budget)
    assert sum(found.attention) == budget.attention and sum(found.neurons) == budget.neurons
    model = AutoModelForCausalLM.from_pretrained(str(pico), dtype=torch.float32).eval()
    seen: list[Tensor] = []
    last = model.model.layers[-1].mlp.down_proj
    last.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    expected = seen[0].double().var(0, correction=0) * last.weight.data.double().square().sum(0)
    torch.testing.assert_close(scores[-1][1], expected, rtol=1e-3, atol=1e-6)


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match=r"'opt'.*llama"):
        require_family(Decoder(make_pico(tmp_path / "opt", config)))


def test_output_projections_come_in_order(pico: Path) -> None:
    specs = output_specs(Decoder(pico), 1)
    assert [spec.key.rpartition("layers.1.")[2] for spec in specs] == [
        "self_attn.o_proj.weight",
        "mlp.down_proj.weight",
    ]
