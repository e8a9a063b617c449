"""One walk over the kinds of layers on a tiny model."""

from __future__ import annotations

from pathlib import Path

import torch
from crepe_deploy.bench.studies.kinds import KINDS, STARTS, Masked, better, everywhere, kind_of, mean, walk

from crepe_deploy.quality.perplexity import load_model
from tests.pico import make_pico_llama


def test_a_walk_ends_no_worse_than_every_setting_for_all_and_counts_its_passes(tmp_path: Path) -> None:
    tokens = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(1))
    masked = Masked(load_model(make_pico_llama(tmp_path / "m")), tokens[4:])
    masked.collect(tokens[:4])
    assert {kind_of(name) for name in masked.layers} == set(KINDS)
    found = walk(masked)
    assert mean(masked.kl(found)) <= min(mean(masked.kl(everywhere(start))) for start in STARTS)
    assert masked.passes == len(masked.known) <= len(STARTS) + 6 * len(KINDS)
    before = masked.perplexity(found, tokens[4:])
    masked.mask(everywhere(STARTS[0]))
    assert masked.perplexity(found, tokens[4:]) == before
    for name, layer in masked.layers.items():
        kept = layer.weight != 0
        assert (kept.view(len(kept), -1, 4).sum(-1) <= 2).all()
        assert torch.equal(layer.weight[kept], masked.dense[name][kept])


def test_both_halves_must_agree() -> None:
    assert better([0.9, 1.0, 0.9, 1.0], [1.0, 1.0, 1.0, 1.0])
    assert not better([0.1, 0.1, 1.1, 1.0], [1.0, 1.0, 1.0, 1.0])
