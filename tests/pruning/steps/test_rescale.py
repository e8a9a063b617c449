"""`--rescale logits`: the factor is the best one, it lands in every family's last norm, and held out is held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from scipy.optimize import minimize_scalar
from torch import Tensor

from crepe_deploy.errors import ConfigError, UnsupportedModel
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.pruning.steps import Steps
from crepe_deploy.pruning.steps.rescale import LogitRescaler, last_norm, minimum, scaled
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.manifest import Manifest, verify
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.texts import CalibrationSet
from tests.pico import VOCAB, make_pico, make_pico_llama
from tests.pruning.test_prune import CONFIGS, windows
from tests.pruning.test_prune import text as text


def run(model: Path, out: Path, calibration: CalibrationSet, **config: Any) -> Manifest:
    settings = {"reconstruct": "exact:max_steps=3", "rescale": "logits", **config}
    return prune(resolve_model(str(model)), out, prune_config("ria", "2:4", **settings), calibration)


def hidden_states(model: Any, tokens: Tensor) -> Tensor:
    """What the last norm of a stock Llama reads."""
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model(tokens)
    handle.remove()
    return seen[0]


def test_the_factor_is_the_one_that_brute_force_finds(tmp_path: Path) -> None:
    """Stock transformers, its logits divided by temperatures, against the grid and its parabola."""
    folder = make_pico_llama(tmp_path / "m")
    model = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(VOCAB, (4, 48), generator=torch.Generator().manual_seed(1))
    dense = hidden_states(model, tokens)
    noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(2))
    pruned = dense + 0.4 * dense.std() * noise
    with torch.inference_mode():
        wanted, found = (model.lm_head(model.model.norm(states)) for states in (dense, pruned))

    def divergence(factor: float) -> float:
        difference = wanted.log_softmax(-1) - (factor * found).log_softmax(-1)
        return float((wanted.softmax(-1) * difference).sum(-1).mean())

    best = minimize_scalar(divergence, bounds=(0.5, 1.5), method="bounded")
    decoder = Decoder(folder)
    with decoder.head() as head:
        before = head(tokens, pruned)
        rescaled = LogitRescaler().fit(decoder, head, tokens, dense, pruned)
        assert torch.equal(head(tokens, pruned), before)
    assert rescaled.factor == pytest.approx(best.x, abs=2e-3)
    assert rescaled.factor < 0.95
    assert rescaled.kl == pytest.approx(best.fun, rel=1e-3)
    assert rescaled.kl_before == pytest.approx(divergence(1.0), rel=1e-4)


def test_a_model_that_is_right_is_left_alone(tmp_path: Path) -> None:
    folder = make_pico_llama(tmp_path / "m")
    tokens = torch.randint(VOCAB, (2, 32), generator=torch.Generator().manual_seed(1))
    dense = hidden_states(tf.AutoModelForCausalLM.from_pretrained(folder).eval(), tokens)
    decoder = Decoder(folder)
    with decoder.head() as head:
        rescaled = LogitRescaler().fit(decoder, head, tokens, dense, dense)
    assert rescaled.factor == pytest.approx(1, abs=1e-3)
    assert rescaled.kl_before == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_gets_its_last_norm_scaled(tmp_path: Path, text: Path, family: str) -> None:
    """And nothing else: logits are the factor times what they are with the source's last norm (or capped)."""
    model = make_pico(tmp_path / "m", CONFIGS[family])
    manifest = run(model, tmp_path / "out", windows(model, text, samples=8))
    verify(tmp_path / "out")
    factor = manifest.metrics["rescale"]["factor"]
    assert manifest.metrics["rescale"]["kl"] <= manifest.metrics["rescale"]["kl_before"]
    assert factor != 1
    decoder = Decoder(model)
    names, added = last_norm(decoder)
    pruned = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        rescaled = pruned(tokens).logits
        for name in names:
            source = decoder.reader.load(decoder.key(name))
            written = CheckpointReader(tmp_path / "out").load(decoder.key(name))
            torch.testing.assert_close(written + added, factor * (source + added))
            pruned.get_parameter(name).copy_(source)
        plain = pruned(tokens).logits
    if family == "gemma2":  # its logits are capped by a hyperbolic tangent
        cap = CONFIGS[family].final_logit_softcapping
        plain, rescaled = (cap * (logits / cap).atanh() for logits in (plain, rescaled))
    torch.testing.assert_close(rescaled, factor * plain, atol=1e-4, rtol=1e-3)


def test_a_model_without_a_last_norm_is_refused_before_any_work(tmp_path: Path, text: Path) -> None:
    """As the 350M OPT, whose norms come after."""
    config = tf.OPTConfig(**{**CONFIGS["opt"].to_dict(), "do_layer_norm_before": False})
    model = make_pico(tmp_path / "m", config)
    with pytest.raises(UnsupportedModel, match="this 'opt' has none"):
        run(model, tmp_path / "out", windows(model, text, samples=8))
    assert not (tmp_path / "out").exists()


def test_masks_and_weights_never_see_what_is_held_out(tmp_path: Path, text: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    calibration = windows(model, text, samples=8)
    run(model, tmp_path / "rescaled", calibration)
    fewer = windows(model, text, samples=8)
    object.__setattr__(fewer, "tokens", fewer.tokens[:6])
    run(model, tmp_path / "plain", fewer, rescale=None)
    rescaled, plain = CheckpointReader(tmp_path / "rescaled"), CheckpointReader(tmp_path / "plain")
    changed = {name for name in plain.tensors if not torch.equal(plain.load(name), rescaled.load(name))}
    assert changed == {"model.norm.weight"}


@pytest.mark.parametrize(
    ("samples", "config", "message"),
    [
        (3, {}, "3 are too few"),
        (8, {"reconstruct": None}, "give --reconstruct and --feed both"),
        (8, {"feed": "pruned"}, "give --reconstruct and --feed both"),
        (8, {"rescale": "logits:windows=0"}, "windows is 0"),
        (8, {"rescale": "norms"}, "known: logits"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, text: Path, samples: int, config: dict[str, Any], message: str
) -> None:
    model = make_pico_llama(tmp_path / "m")
    with pytest.raises(ConfigError, match=message):
        run(model, tmp_path / "out", windows(model, text, samples=samples), **config)
    assert not (tmp_path / "out").exists()


def test_the_minimum_is_the_bottom_of_a_parabola_and_nothing_is_extrapolated() -> None:
    places = (0.8, 0.9, 1.0, 1.1)
    found = minimum(places, [(place - 0.93) ** 2 + 2 for place in places])
    assert found == pytest.approx((0.93, 2))
    assert minimum(places, [4.0, 3.0, 2.0, 1.0]) == (1.1, 1.0)
    assert minimum(places, [1.0, 2.0, 3.0, 4.0]) == (0.8, 1.0)


def test_a_gain_that_is_stored_less_one_is_scaled_whole() -> None:
    stored = torch.tensor([0.0, 1.0, -0.5], dtype=torch.bfloat16)
    assert scaled(stored, 0.5, 1.0).tolist() == [-0.5, 0.0, -0.75]
    assert scaled(stored, 0.5, 0.0).tolist() == [0.0, 0.5, -0.25]
    assert scaled(stored, 0.5, 1.0).dtype == torch.bfloat16


@pytest.mark.parametrize(("samples", "held"), [(4, 1), (16, 4), (128, 8), (256, 8)])
def test_at_most_a_quarter_is_held_out(samples: int, held: int) -> None:
    assert Steps(rescale=LogitRescaler()).held_out(samples) == held
    assert Steps().held_out(samples) == 0
