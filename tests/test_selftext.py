"""`--calib self`: windows that the model itself writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from crepe_deploy.cli import run
from crepe_deploy.machine import cache_dir
from crepe_deploy.model.architecture import whole_model
from crepe_deploy.selftext import PROMPTS, SELF, sample, starts_of
from crepe_deploy.store.manifest import load_manifest
from crepe_deploy.texts import CalibrationSet, calibration_windows, load_tokenizer
from tests.pico import make_pico_llama, pico_tokenizer, sample_text

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_pico_llama(tmp_path / "model")


def written(model: Path, samples: int = 5, length: int = 12, seed: int = 0) -> tuple[CalibrationSet, list[str]]:
    said: list[str] = []
    return calibration_windows(SELF, load_tokenizer(model), samples, length, seed, say=said.append), said


def test_the_same_windows_from_the_cache_and_others_for_another_seed_or_model(model: Path, tmp_path: Path) -> None:
    first, said = written(model)
    assert first.tokens.shape == (5, 12) and first.tokens.dtype == torch.long
    assert len(said) == 1 and str(cache_dir() / SELF) in said[0]
    again, silence = written(model)
    assert torch.equal(again.tokens, first.tokens) and silence == []
    assert again.record() == first.record()
    assert not torch.equal(written(model, seed=1)[0].tokens, first.tokens)
    other, said = written(make_pico_llama(tmp_path / "other", seed=1))
    assert said and not torch.equal(other.tokens, first.tokens)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"tokens": 3}', '{"tokens": ["1 2", "3"]}', '{"tokens": ["a"]}'])
def test_a_damaged_cache_is_written_anew(model: Path, content: str) -> None:
    first, _ = written(model)
    (kept,) = (cache_dir() / SELF).iterdir()
    whole = kept.read_text()
    kept.write_text(content)
    again, said = written(model)
    assert said and torch.equal(again.tokens, first.tokens) and kept.read_text() == whole


def test_ids_beyond_the_vocabulary_in_the_cache_are_not_believed(model: Path) -> None:
    first, _ = written(model)
    (kept,) = (cache_dir() / SELF).iterdir()
    document = json.loads(kept.read_text())
    document["tokens"][0] = " ".join(["320"] * 12)
    kept.write_text(json.dumps(document))
    assert torch.equal(written(model)[0].tokens, first.tokens)


def test_it_is_what_the_model_gives_to_each_draw(model: Path) -> None:
    loaded = whole_model(model)
    tokens = sample(loaded, [[0], [7, 8, 9]], [], 4, 10, seed=3)
    assert tokens[:, 0].tolist() == [0, 7, 0, 7] and tokens[1, :3].tolist() == [7, 8, 9]
    draws = torch.rand(4, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.inference_mode():
        chances = loaded(tokens).logits.softmax(-1).double().cumsum(-1)
    for row, first in ((0, 1), (1, 3), (2, 1), (3, 3)):
        for position in range(first, 10):
            token, draw, summed = int(tokens[row, position]), draws[row, position - 1], chances[row, position - 1]
            assert summed[token] >= draw - 1e-5 and (token == 0 or summed[token - 1] <= draw + 1e-5)


def test_the_end_of_text_starts_anew(model: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(str(model))
    ends = list(range(320))  # whatever it writes ends its text
    assert sample(loaded.eval(), [[5, 6]], ends, 1, 9, seed=0)[0].tolist()[:2] == [5, 6]
    tokens = sample(loaded.eval(), [[5, 6]], ends, 1, 9, seed=0)[0].tolist()
    assert tokens[3:5] == [5, 6] and tokens[6:8] == [5, 6]


def test_starts_are_bos_the_templates_answer_and_prompts_in_that_order() -> None:
    tokenizer = pico_tokenizer().__class__(
        tokenizer_object=pico_tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    assert starts_of(tokenizer, bos=False) == ([[0]], "BOS")
    tokenizer.chat_template = TEMPLATE
    answer = tokenizer("<answer>", add_special_tokens=False)["input_ids"]
    assert starts_of(tokenizer, bos=False)[0] == [[0], answer]
    assert starts_of(tokenizer, bos=True)[0] == [[0], [0, *answer]]
    tokenizer.chat_template = "{{ raise_exception('only tools') }}"
    assert starts_of(tokenizer, bos=False)[0] == [[0]]
    tokenizer.chat_template, tokenizer.bos_token = None, None
    starts, words = starts_of(tokenizer, bos=False)
    assert len(starts) == len(PROMPTS) and all(starts) and "10 prompts" in words


def test_prune_takes_it_alone_and_beside_a_file(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "calib.txt"
    text.write_text(sample_text(2000))
    sizes = ["--calib-samples", "5", "--calib-length", "16", "--method", "ria"]
    assert run(["prune", str(model), "--out", str(tmp_path / "alone"), "--calib", "self", *sizes]) == 0
    noted = load_manifest(tmp_path / "alone").calibration
    assert noted is not None and noted["source"] == "self" and "written by the model itself" in noted["rule"]
    assert (
        run(["prune", str(model), "--out", str(tmp_path / "both"), "--calib", "self", "--calib", str(text), *sizes])
        == 0
    )
    mixed = load_manifest(tmp_path / "both").calibration
    assert mixed is not None and [part["source"] for part in mixed["parts"]] == ["self", str(text)]
    assert [part["samples"] for part in mixed["parts"]] == [3, 2] and "written by the model itself" in mixed["rule"]
