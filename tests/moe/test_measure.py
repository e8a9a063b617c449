"""What is measured of experts is what a loop over tokens and experts finds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from crepe_deploy.model.blocks import expert_layer
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.proof import walk_logits
from crepe_deploy.moe.choose import effective
from crepe_deploy.moe.measure import LayerStats, measure, metered
from tests.moe.reference import statistics
from tests.pico import VOCAB
from tests.pico_moe import FAMILIES, make_moe

TOKENS = torch.randint(3, VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("layout", FAMILIES)
def test_statistics_are_those_of_a_loop(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crepe_deploy.moe.measure.PART_NUMBERS", 7 * 4 * 3 * 64)  # seven tokens at a time
    decoder = Decoder(make_moe(tmp_path / "moe", layout), experts=True)
    assert decoder.experts is not None
    hidden = torch.randn(20, 64, generator=torch.Generator().manual_seed(2))
    with decoder.block(2) as (block, _), torch.inference_mode():
        layer = expert_layer(block, decoder.experts)
        assert layer is not None
        router, experts = layer
        _, weights, chosen = router(hidden)
        expected = experts(hidden, chosen, weights)
        with metered(router, experts, decoder.experts.spread(decoder.config)) as meter:
            torch.testing.assert_close(experts(hidden, chosen, weights), expected)
        slow = statistics(router, experts, hidden)
        for field in fields(LayerStats):
            if field.name == "gram" and layout == "deepseek_v3":
                continue  # the loop lets the choice of groups change
            torch.testing.assert_close(
                getattr(meter.stats, field.name), getattr(slow, field.name), rtol=1e-4, atol=1e-5
            )


def test_every_layer_with_experts_is_measured_on_what_the_whole_model_computes(tmp_path: Path) -> None:
    decoder = Decoder(make_moe(tmp_path / "moe", "glm4_moe"), experts=True)
    stats = measure(decoder, TOKENS)
    assert list(stats) == [1, 2]
    assert all(int(one.tokens.sum()) == 2 * TOKENS.numel() for one in stats.values())
    assert torch.equal(walk_logits(decoder, TOKENS), walk_logits(Decoder(tmp_path / "moe", experts=True), TOKENS))


def test_effective_experts_are_as_many_as_an_even_choice_has() -> None:
    assert effective(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert effective(torch.tensor([5, 5, 0, 0])) == pytest.approx(2)
