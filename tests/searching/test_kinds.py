"""Coefficients by kind of layer: what the walk finds, that `prune` makes the same masks of it, and that a stop changes
nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from crepe_deploy.errors import ConfigError
from crepe_deploy.pattern import NM, as_pattern
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.quality.perplexity import evaluate
from crepe_deploy.searching import evaluate as evaluation
from crepe_deploy.searching.kinds import FAMILIES, candidates
from crepe_deploy.searching.run import SearchConfig, journal_path, search
from crepe_deploy.searching.space import anchors
from crepe_deploy.store.sources import resolve_model
from crepe_deploy.texts import CalibrationSet, calibration_windows, load_tokenizer
from tests.pico import make_pico_llama, sample_text

CONFIG = SearchConfig(NM(2, 4), optimizer="kinds", kernel_sizes=(3, 7), workers=1)


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("pico") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "search.txt"
    path.write_text(sample_text(3000, 1), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokens(pico: Path, text: Path) -> tuple[CalibrationSet, CalibrationSet]:
    """To calibrate on; and to judge on, the windows that `evaluate` cuts."""
    tokenizer = load_tokenizer(pico)
    drawn = calibration_windows(text, tokenizer, 4, 32)
    ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt")["input_ids"]
    return drawn, replace(drawn, tokens=ids[0, :128].view(4, 32))


def run(pico: Path, out: Path, tokens: tuple[CalibrationSet, CalibrationSet], **more: Any) -> Any:
    return search(resolve_model(str(pico)), out, CONFIG, *tokens, **more)


def test_what_is_found_beats_the_anchors_and_prunes_to_the_loss_that_it_says(
    pico: Path, text: Path, tokens: tuple[CalibrationSet, CalibrationSet], tmp_path: Path
) -> None:
    said: list[str] = []
    document = run(pico, tmp_path / "found.json", tokens, say=said.append)
    assert json.loads((tmp_path / "found.json").read_text()) == document
    assert document["kinds"] and all(kind.endswith("_proj") for kind in document["kinds"])
    assert [line.partition(":")[0] for line in said][:3] == ["gate_proj", "up_proj", "down_proj"]
    facts = document["provenance"]
    assert facts["result"]["kl"] <= min(anchor["kl"] for anchor in facts["anchors"].values())
    assert facts["judged"] == facts["evaluations"] == len(anchors()) + 3 + 7 * 6  # one start is an anchor
    config = prune_config(preset=tmp_path / "found.json")
    prune(resolve_model(str(pico)), tmp_path / "out", config, tokens[0])
    report = evaluate(tmp_path / "out", text, window=32, max_tokens=128, against=pico)
    assert report.paired is not None
    assert facts["result"]["kl"] == pytest.approx(report.paired.kl_mean.value, rel=1e-4)
    assert facts["result"]["perplexity"] == pytest.approx(report.perplexity.value, rel=1e-4)


def test_a_stopped_walk_ends_where_it_would_have(
    pico: Path, tokens: tuple[CalibrationSet, CalibrationSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(pico, tmp_path / "whole.json", tokens)
    measure, calls = evaluation.Evaluator._measure, []

    def stopping(self: Any, settings: Any, label: str) -> Any:
        calls.append(len(settings))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(self, settings, label)

    out = tmp_path / "found.json"
    monkeypatch.setattr(evaluation.Evaluator, "_measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(pico, out, tokens)
    assert journal_path(out).is_file() and not out.exists()
    monkeypatch.undo()
    resumed = run(pico, out, tokens, resume=True)
    assert (resumed["params"], resumed["kinds"]) == (whole["params"], whole["kinds"])
    assert resumed["provenance"]["result"] == whole["provenance"]["result"]


def test_one_window_has_no_halves(pico: Path, tokens: tuple[CalibrationSet, CalibrationSet], tmp_path: Path) -> None:
    one = replace(tokens[1], tokens=tokens[1].tokens[:1])
    with pytest.raises(ConfigError, match="2 --text-samples or more"):
        run(pico, tmp_path / "found.json", (tokens[0], one))


def test_candidates_are_the_other_families_and_both_steps() -> None:
    params = {**FAMILIES[1], "exponent": 0.75}
    tried = candidates(params)
    assert params not in tried and len(tried) == len(FAMILIES) - 1 + 2
    assert math.isclose(max(own["exponent"] for own in tried), 1.0)
    assert len(candidates({**params, "exponent": 0.0})) == len(FAMILIES) - 1 + 1


@pytest.mark.parametrize("kind", ["2:4", "0.5", "0.5/matrix"])
def test_no_anchor_is_better_under_any_pattern(
    pico: Path, tokens: tuple[CalibrationSet, CalibrationSet], tmp_path: Path, kind: str
) -> None:
    """Wanda may be the best anchor: with zeros counted over the matrix it has no twin in the walk."""
    config = replace(CONFIG, pattern=as_pattern(kind), evaluations=7)
    document = search(resolve_model(str(pico)), tmp_path / "found.json", config, *tokens)
    facts = document["provenance"]
    assert facts["result"]["kl"] <= min(anchor["kl"] for anchor in facts["anchors"].values())
    assert facts["judged"] == 7 and "kinds" not in document
