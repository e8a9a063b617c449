"""The optional steps through the whole pipeline, on tiny random models of every family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from crepe_deploy.errors import ConfigError
from crepe_deploy.model.calibrate import embed
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.model.proof import walk_logits
from crepe_deploy.model.stats import Need
from crepe_deploy.pattern import NM, Unstructured, parse_pattern, parse_record, zero_count
from crepe_deploy.pruning.config import Origin, PruneConfig, prune_config
from crepe_deploy.pruning.methods.magnitude import Magnitude
from crepe_deploy.pruning.prune import prune
from crepe_deploy.pruning.steps import KINDS, Steps, build_step, build_steps
from crepe_deploy.pruning.steps.allocate import allocate
from crepe_deploy.pruning.steps.folds import foldables
from crepe_deploy.pruning.steps.permute import Fold
from crepe_deploy.store.checkpoint import CheckpointReader
from crepe_deploy.store.manifest import Manifest, verify
from crepe_deploy.store.sources import resolve_model
from tests.pico import VOCAB, make_pico, make_pico_llama
from tests.pruning.test_prune import CONFIGS, VARIANTS, windows


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("llama") / "m")


def run(model: Path, out: Path, text: Path, method: str = "ria", pattern: str = "2:4", **config: Any) -> Manifest:
    settings = prune_config(method, parse_pattern(pattern), **config)
    return prune(resolve_model(str(model)), out, settings, windows(model, text, samples=12, length=64))


def mean_error(manifest: Manifest) -> float:
    return float(manifest.metrics["mean_layer_error"])


@pytest.mark.parametrize(
    "config",
    [
        {"reprune": "dsnot"},
        {"reprune": "dsnot-ria:max_cycles=3"},
        {"reprune": "swaps"},
        {"reconstruct": "obs"},
        {"reconstruct": "exact:damping=0.1"},
        {"reprune": "swaps", "reconstruct": "exact", "permute": "fold"},
        {"method": "sparsegpt", "reconstruct": "exact"},
        {"method": "sparsegpt", "permute": "fold"},
        {"allocate": "error", "pattern": "16:32", "reconstruct": "obs"},
    ],
    ids=str,
)
def test_steps_compose_and_are_recorded(tmp_path: Path, llama: Path, text: Path, config: dict[str, Any]) -> None:
    manifest = run(llama, tmp_path / "out", text, **config)
    verify(tmp_path / "out")
    reader = CheckpointReader(tmp_path / "out")
    for name, record in manifest.tensors.items():
        pattern = parse_record(record.pattern)
        assert isinstance(pattern, NM)
        kept = (reader.load(name) != 0).view(record.shape[0], -1, pattern.m).sum(-1)
        assert (kept == pattern.n).all(), name
    for kind in KINDS:
        name = config.get(kind)
        assert manifest.config.get(kind) == name
        assert (name is None) == (kind not in manifest.config["resolved_steps"])
    if "reconstruct" in config:
        assert manifest.config["feed"] == "both"
        assert all(0 < record.notes["reconstruct_error_left"] <= 1 for record in manifest.tensors.values())
    if "reprune" in config:
        assert sum(record.notes["reprune_swaps"] for record in manifest.tensors.values()) > 0


def test_an_updating_step_brings_the_logits_closer(tmp_path: Path, llama: Path, text: Path) -> None:
    tokens = windows(llama, text, samples=12, length=64).tokens
    dense = walk_logits(Decoder(llama), tokens)
    distance = {}
    for name in ("none", "obs", "exact"):
        run(llama, tmp_path / name, text, reconstruct=None if name == "none" else name, feed="pruned")
        distance[name] = float((walk_logits(Decoder(tmp_path / name), tokens) - dense).square().mean())
    assert distance["exact"] < distance["obs"] < distance["none"]


@pytest.mark.parametrize("family", CONFIGS)
def test_folding_an_order_changes_no_logit(tmp_path: Path, text: Path, family: str) -> None:
    """Every family: with all weights kept but one of 32 the permuted model computes what the plain one does."""
    model = make_pico(tmp_path / "m", CONFIGS[family])
    decoder = Decoder(model)
    orders = {"exclude": "|".join(spec.path for spec in decoder.linears[0] if not _folds(decoder, spec.path)) or None}
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    dense = walk_logits(decoder, tokens)
    plain = run(model, tmp_path / "plain", text, pattern="2:4", **orders)
    folded = run(model, tmp_path / "folded", text, pattern="2:4", permute="fold", **orders)
    gains = [record.notes["score_retained_gain"] for record in folded.tensors.values()]
    assert min(gains) >= 0
    assert max(gains) > 0
    assert mean_error(folded) < mean_error(plain)
    assert not torch.allclose(walk_logits(Decoder(tmp_path / "folded"), tokens), dense, atol=1e-4)


def _folds(decoder: Decoder, path: str) -> bool:
    return any(fold.path == path for fold in foldables(decoder))


@dataclass(frozen=True)
class Shuffle(Fold):
    """Moves whole groups and shuffles inside them: a weight that holds its pattern holds it still."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def search(self, score: torch.Tensor, n: int, m: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(score.shape[1])
        groups = torch.randperm(score.shape[1] // m, generator=generator)
        inside = torch.stack([torch.randperm(m, generator=generator) for _ in groups])
        return (groups.unsqueeze(1) * m + inside).flatten()


@pytest.mark.parametrize("family", [*CONFIGS, *VARIANTS])
def test_a_permuted_model_is_the_same_model(tmp_path: Path, family: str) -> None:
    """Where the mask prunes only zeros, what is left of the pipeline is the permutation: logits must not move."""
    model, sparse, out = (tmp_path / name for name in ("m", "sparse", "out"))
    make_pico(model, {**CONFIGS, **VARIANTS}[family])
    prune(resolve_model(str(model)), sparse, prune_config("magnitude", "2:4"), None)
    shuffled = PruneConfig(Magnitude(), NM(2, 4), Origin("magnitude"), Steps(permute=Shuffle()))
    prune(resolve_model(str(sparse)), out, shuffled, None)
    before, after = CheckpointReader(sparse), CheckpointReader(out)
    moved = {name for name in before.tensors if not torch.equal(before.load(name), after.load(name))}
    decoder = Decoder(sparse)
    paths = {path for fold in foldables(decoder) for path in (fold.path, *fold.producers)}
    assert len(foldables(decoder)) == 2
    assert {path for path in paths if any(path in name for name in moved)} == paths
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(walk_logits(Decoder(out), tokens), walk_logits(decoder, tokens), atol=2e-5, rtol=1e-4)


def test_groups_wider_than_a_head_leave_its_channels_in_place(tmp_path: Path, llama: Path, text: Path) -> None:
    manifest = run(llama, tmp_path / "out", text, pattern="16:32", permute="fold")
    gains = {name for name, record in manifest.tensors.items() if "score_retained_gain" in record.notes}
    assert gains == {f"model.layers.{block}.mlp.down_proj.weight" for block in range(2)}
    assert manifest.metrics["limits"] == [
        "--permute fold: inputs of self_attn.o_proj are not reordered, for groups of 32 span several heads"
    ]


@pytest.mark.parametrize("pattern", ["16:32", "2:4", "0.5", "0.7", "0.6/matrix"])
@pytest.mark.parametrize("name", ["owl", "alpha", "error"])
def test_allocation_holds_the_budget_exactly(tmp_path: Path, llama: Path, text: Path, name: str, pattern: str) -> None:
    parsed = parse_record(pattern)
    settings = prune_config("wanda", parsed, allocate=name)
    manifest = prune(resolve_model(str(llama)), tmp_path / "out", settings, windows(llama, text))
    expected = sum(zero_count(parsed, *record.shape) for record in manifest.tensors.values())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(int((weights[key] == 0).sum()) for key in manifest.tensors) == expected
    for key, record in manifest.tensors.items():
        found = parse_record(record.pattern)
        assert int((weights[key] == 0).sum()) == zero_count(found, *record.shape) == record.zeros
        if isinstance(parsed, NM):
            assert isinstance(found, NM)
            assert found.m == parsed.m
    if pattern not in ("2:4",):
        assert len(manifest.metrics["patterns"]) > 1
    for block in range(2):
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            names = {manifest.tensors[f"model.layers.{block}.{path}.weight"].pattern for path in fused}
            assert len(names) == 1 or (isinstance(parsed, Unstructured) and parsed.granularity == "matrix")


def test_allocation_with_excluded_blocks(llama: Path, text: Path) -> None:
    decoder = Decoder(llama)
    targets = [[], decoder.linears[1]]
    (stream,) = embed(decoder, [windows(llama, text).tokens])
    patterns = allocate(decoder, targets, stream, build_step("allocate", "error"), parse_pattern("16:32"))
    assert patterns.keys() == {spec.key for spec in decoder.linears[1]}


def test_steps_are_refused_by_name(tmp_path: Path, llama: Path, text: Path) -> None:
    def attempt(message: str, method: str = "ria", pattern: str = "2:4", **config: Any) -> None:
        with pytest.raises(ConfigError, match=message):
            run(llama, tmp_path / "out", text, method, pattern, **config)
        assert not (tmp_path / "out").exists()

    attempt("--reprune 'best' is unknown; known: dsnot, dsnot-ria, swaps", reprune="best")
    attempt("--reconstruct exact: 'speed=1' is not NAME=VALUE with a NAME of: damping", reconstruct="exact:speed=1")
    attempt("damping is 'x'", reconstruct="exact:damping=x")
    attempt(r"works in N:M groups, not in 0\.5/row; use dsnot", pattern="0.5", reprune="swaps")
    attempt(r"--permute changes nothing for pattern 0\.5/row", pattern="0.5", permute="fold")
    attempt("--permute 'gather' is unknown; known: fold", permute="gather")
    attempt("--reprune undoes the weights that 'sparsegpt' updates", method="sparsegpt", reprune="dsnot")
    with pytest.raises(ConfigError, match="needs calibration text"):
        prune(resolve_model(str(llama)), tmp_path / "out", prune_config("magnitude", "2:4", reconstruct="obs"), None)


def test_magnitude_with_alpha_needs_no_text(tmp_path: Path, llama: Path) -> None:
    manifest = prune(
        resolve_model(str(llama)), tmp_path / "out", prune_config("magnitude", "16:32", allocate="alpha"), None
    )
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["calibration"] is None
    assert len(manifest.metrics["patterns"]) > 1


def test_parameters_reach_the_step() -> None:
    steps = build_steps({"allocate": "owl:threshold=3,spread=0.2", "reprune": "dsnot-ria"})
    assert steps.record() == {
        "allocate": {"class": "Owl", "threshold": 3, "spread": 0.2},
        "reprune": {"class": "DSnoTRia", "order": "ria", "power": 1.0, "max_cycles": 50, "enough": 0.1},
    }
