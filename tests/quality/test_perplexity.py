"""Perplexity and the paired figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crepe_deploy.bench.assets import Assets
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from crepe_deploy.errors import CalibrationError, CheckpointError, ConfigError, NumericalError
from crepe_deploy.quality import perplexity as quality
from crepe_deploy.quality.perplexity import evaluate, load_model, plan_windows, resolve_bos
from crepe_deploy.quality.scoring import (
    Span,
    bootstrap_interval,
    estimate,
    kl_per_token,
    mean,
    p99,
    same_top_token,
    token_nll,
    window_spans,
)
from tests.pico import make_pico_llama, pico_tokenizer, sample_text

WINDOW = 32


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico_llama(tmp_path_factory.mktemp("pico") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sample_text(300))
    return path


def damaged(pico: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    out.mkdir()
    for file in pico.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 9), (0, 0)])
def test_window_sizes_that_make_no_sense(window: int, stride: int) -> None:
    with pytest.raises(ConfigError):
        window_spans(100, window, stride)


def test_a_text_shorter_than_a_window_says_by_how_much() -> None:
    with pytest.raises(CalibrationError, match="has 7 tokens, 3 short of one window of 10"):
        window_spans(7, 10, 10)


def test_windows_without_overlap_leave_the_rest_out() -> None:
    assert window_spans(10, 4, 4) == [Span(0, 4, 1), Span(4, 8, 5)]
    assert window_spans(8, 4, 4, score_first=True) == [Span(0, 4, 0), Span(4, 8, 4)]
    assert len(window_spans(8192, 512, 512)) == 16
    assert sum(span.end - span.score_from for span in window_spans(8192, 512, 512)) == 16 * 511


@pytest.mark.parametrize("score_first", [False, True])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_sliding_windows_score_each_token_once(stride: int, score_first: bool) -> None:
    spans = window_spans(29, 5, stride, score_first=score_first)
    scored = [token for span in spans for token in range(span.score_from, span.end)]
    assert scored == list(range(0 if score_first else 1, spans[-1].end))
    assert all(span.end - span.start == 5 for span in spans)


def test_nll_and_kl_match_a_loop_and_take_half_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 7, generator=generator).bfloat16() for _ in range(2))
    targets = torch.tensor([0, 6, 2, 2, 5])
    for row in range(5):
        pr, qr = (torch.softmax(logits[row].double(), -1) for logits in (p, q))
        assert token_nll(q, targets)[row].item() == pytest.approx(-math.log(qr[targets[row]].item()), rel=1e-5)
        expected = sum(a * math.log(a / b) for a, b in zip(pr.tolist(), qr.tolist(), strict=True))
        assert kl_per_token(p, q)[row].item() == pytest.approx(expected, rel=1e-5)
    assert kl_per_token(p, p).eq(0).all()
    assert token_nll(q, targets).dtype == torch.float32
    assert same_top_token(p, q).tolist() == [float(p[row].argmax() == q[row].argmax()) for row in range(5)]


def test_bootstrap_interval_covers_the_mean_at_its_level() -> None:
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for trial in range(100):
        windows = list(torch.randn(30, 4, generator=generator))
        low, high = bootstrap_interval(windows, mean, resamples=300, seed=trial) or (0.0, 0.0)
        hits += low <= 0 <= high
    assert 85 <= hits <= 100


def test_bootstrap_is_seeded_paired_and_absent_for_one_window() -> None:
    windows = list(torch.randn(9, 4, generator=torch.Generator().manual_seed(2)))
    first = bootstrap_interval(windows, mean, seed=5)
    assert first == bootstrap_interval(windows, mean, seed=5) != bootstrap_interval(windows, mean, seed=6)
    assert first is not None and first[0] <= estimate(windows, mean).value <= first[1]
    assert bootstrap_interval(windows[:1], mean) is None
    assert estimate(windows[:1], p99).low is None
    assert p99(np.arange(101.0)) == 99


def test_bos_modes_place_and_score_as_said() -> None:
    ids = torch.arange(10, 30)
    none = plan_windows(ids, 5, None, None, "none", 0)
    assert [row.tolist() for row in none.sequences[:2]] == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]
    assert none.first_scored == [1] * 4
    assert (none.tokens, none.predicted) == (20, 16)
    start = plan_windows(ids, 5, None, 10, "start", 0)
    assert [row.tolist() for row in start.sequences] == [[0, 10, 11, 12, 13], [14, 15, 16, 17, 18]]
    windows = plan_windows(ids, 5, None, None, "window", 0)
    assert [row.tolist() for row in windows.sequences[:2]] == [[0, 10, 11, 12, 13], [0, 14, 15, 16, 17]]
    assert (windows.first_scored, windows.predicted, windows.stride) == ([1] * 5, 20, 4)
    overlapping = plan_windows(ids, 5, 2, None, "window", 0)
    assert overlapping.first_scored[:2] == [1, 3]


def test_bos_auto_follows_the_tokenizer_and_unknown_is_refused() -> None:
    tokenizer = pico_tokenizer()
    assert resolve_bos(tokenizer, "auto") == "none"
    assert resolve_bos(tokenizer, "window") == "window"
    with pytest.raises(ConfigError, match="known: auto"):
        resolve_bos(tokenizer, "always")
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ConfigError, match="has none"):
        resolve_bos(bare, "start")


@pytest.mark.parametrize("max_tokens", [None, 5 * WINDOW])
def test_perplexity_is_transformers_own_loss(pico: Path, text: Path, max_tokens: int | None) -> None:
    report = evaluate(pico, text, window=WINDOW, max_tokens=max_tokens)
    model = AutoModelForCausalLM.from_pretrained(pico)
    ids = torch.tensor(pico_tokenizer()(text.read_text()).input_ids)[:max_tokens]
    rows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    with torch.no_grad():
        loss = model(rows, labels=rows).loss.item()
    assert report.perplexity.value == pytest.approx(math.exp(loss), rel=1e-4)
    convention = report.convention
    assert (convention.windows, convention.predicted) == (len(rows), len(rows) * (WINDOW - 1))
    assert (convention.tokens, convention.stride, convention.bos) == (rows.numel(), WINDOW, "none")
    assert convention.dtype == "float32"
    assert report.perplexity.low is not None and report.perplexity.low < report.perplexity.value
    assert json.loads(json.dumps(report.to_dict()))["paired"] is None


def test_a_stride_gives_more_context_and_scores_every_token(pico: Path, text: Path) -> None:
    report = evaluate(pico, text, window=WINDOW, stride=8, max_tokens=100)
    model = AutoModelForCausalLM.from_pretrained(pico)
    ids = torch.tensor(pico_tokenizer()(text.read_text()).input_ids)[:100]
    losses = []
    for start in range(0, 100 - WINDOW + 1, 8):
        with torch.no_grad():
            logits = model(ids[None, start : start + WINDOW]).logits[0]
        first = 1 if start == 0 else WINDOW - 8
        losses.append(token_nll(logits[first - 1 : -1], ids[start + first : start + WINDOW]))
    assert report.perplexity.value == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)


def test_a_model_against_itself_is_no_distance_and_ratio_one(pico: Path, text: Path) -> None:
    paired = evaluate(pico, text, window=WINDOW, against=pico).paired
    assert paired is not None
    assert (paired.kl_mean.value, paired.kl_p99.value, paired.same_top.value) == (0, 0, 1)
    assert (paired.perplexity_ratio.value, paired.perplexity_ratio.low, paired.perplexity_ratio.high) == (1, 1, 1)


def test_paired_figures_match_separate_runs(pico: Path, text: Path, tmp_path: Path) -> None:
    def weaken(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][::2] = 0

    other = damaged(pico, tmp_path / "other", weaken)
    calls: list[tuple[int, int]] = []
    report = evaluate(
        other, text, window=WINDOW, against=pico, progress=lambda done, total: calls.append((done, total))
    )
    alone = evaluate(pico, text, window=WINDOW)
    paired = report.paired
    assert paired is not None
    assert paired.reference_perplexity == alone.perplexity
    ratio = report.perplexity.value / alone.perplexity.value
    assert paired.perplexity_ratio.value == pytest.approx(ratio, rel=1e-5)
    assert 0 < paired.kl_mean.value < paired.kl_p99.value
    assert paired.kl_mean.low is not None and paired.kl_mean.low > 0
    assert 0 < paired.same_top.value < 1
    windows = report.convention.windows
    assert calls == [(done + 1, windows) for done in range(windows)]
    assert json.loads(json.dumps(report.to_dict()))["paired"]["reference"] == str(pico)


def test_window_is_clipped_to_the_context_and_chunks_do_not_matter(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(sample_text(600))
    report = evaluate(pico, path)
    assert report.convention.window == 512
    monkeypatch.setattr(quality, "LOGIT_ROWS", 7)
    assert evaluate(pico, path).perplexity.value == pytest.approx(report.perplexity.value, rel=1e-6)


def test_dtype_is_the_checkpoints_unless_asked(tmp_path: Path, text: Path) -> None:
    half = make_pico_llama(tmp_path / "half", dtype=torch.bfloat16)
    assert evaluate(half, text, window=WINDOW).convention.dtype == "bfloat16"
    assert evaluate(half, text, window=WINDOW, dtype="float32").convention.dtype == "float32"
    with pytest.raises(ConfigError, match="dtype 'int3'"):
        evaluate(half, text, window=WINDOW, dtype="int3")


def test_nan_weights_are_an_error_and_no_number(pico: Path, text: Path, tmp_path: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan

    with pytest.raises(NumericalError, match="window 1"):
        evaluate(damaged(pico, tmp_path / "nan", poison), text, window=WINDOW)


def test_missing_weights_are_not_filled_with_noise(pico: Path, text: Path, tmp_path: Path) -> None:
    def forget(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.down_proj.weight"]

    with pytest.raises(CheckpointError, match=r"lacks weights .*layers.1.mlp.down_proj"):
        evaluate(damaged(pico, tmp_path / "holes", forget), text, window=WINDOW)


def test_truncated_missing_and_pickled_models_are_refused(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(tmp_path)
    cut = damaged(pico, tmp_path / "cut", lambda tensors: None)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_model(cut)
    (cut / "model.safetensors").unlink()
    torch.save(load_file(pico / "model.safetensors"), cut / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors only"):
        load_model(cut)


def test_models_of_other_tokenizers_or_padding_cannot_be_compared(pico: Path, text: Path, tmp_path: Path) -> None:
    padded = make_pico_llama(tmp_path / "padded", vocab_size=384)
    with pytest.raises(ConfigError, match="320 and 384 tokens"):
        evaluate(pico, text, window=WINDOW, against=padded)
    other = damaged(pico, tmp_path / "other", lambda tensors: None)
    content: dict[str, Any] = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-20]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="different tokenizers"):
        evaluate(pico, text, window=WINDOW, against=other)


def test_too_little_text_and_bad_text_are_errors(pico: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the city")
    with pytest.raises(CalibrationError, match="short of one window"):
        evaluate(pico, path, window=WINDOW)
    path.write_bytes(b"\xff")
    with pytest.raises(CalibrationError, match="not UTF-8"):
        evaluate(pico, path, window=WINDOW)


@pytest.mark.real
def test_smollm2_perplexity_on_wiki(assets: Assets) -> None:
    report = evaluate(assets.model, assets.text("wiki"), window=512, max_tokens=2048)
    assert report.convention.predicted == 2044
    assert report.convention.dtype == "bfloat16"
    assert report.perplexity.value == pytest.approx(33.06, rel=0.02)
