"""llama.cpp itself, where llama-cpp-python is installed: the same tokens, logits and words as transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crepe_deploy.exporting.formats.gguf import FILE
from crepe_deploy.exporting.llamacpp.vocabulary import SPLITTERS
from crepe_deploy.exporting.pipeline import export_checkpoint
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.export.sliced import EVEN, assembled
from tests.export.test_gguf import STRETCHED
from tests.pico import make_pico_llama, sample_text
from tests.structural.random_plans import UNEVEN, make_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (extra llamacpp)"
)
GREEDY = 16
TEXTS = (
    "The capital of France is",
    " two  blanks\tand\n\n a line,\r\n  indented: x=3; y[42]!='abc'",
    "I'VE we'll DON'T 123 1234567 3.14 (a)...?! <s>not special",
    "naïve Ærø Ünïcode русский 한국어 中文字 🦙🦙 e\u0301",
)


def runtime(folder: Path) -> Any:
    """llama.cpp with the file, caches in float32."""
    from llama_cpp import Llama

    return Llama(
        str(folder / FILE), n_ctx=128, n_threads=1, logits_all=True, verbose=False, flash_attn=False, type_k=0, type_v=0
    )


def agree(model: Path, out: Path) -> None:
    """Logits within a hundredth of a percent, and the same words."""
    export_checkpoint(model, out, "gguf", options={"quantise": "f32"})
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(model)(TEXTS[0])["input_ids"]
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
        words = list(ids)
        for _ in range(GREEDY):
            words.append(int(reference(torch.tensor([words])).logits[0, -1].argmax()))
    found = runtime(out)
    found.eval(ids)
    assert np.abs(np.array(found.scores[: len(ids)]) - expected).max() <= 1e-4 * np.abs(expected).max()
    found.reset()
    said: list[int] = []
    for token in found.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        said.append(token)
        if len(said) == GREEDY:
            break
    assert said == words[len(ids) :]


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {}),
        *(("llama", {"rope_parameters": rope, "head_dim": 16}) for rope in STRETCHED.values()),
    ],
    ids=["llama", "biases", "tied", "mistral", "qwen2", "qwen3", *STRETCHED],
)
def test_families(tmp_path: Path, family: str, own: dict[str, Any]) -> None:
    agree(make_model(tmp_path / "model", family, **own), tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "widths"), [("llama", "uniform"), ("qwen2", "uniform"), ("llama", "per-layer"), ("mistral", "per-layer")]
)
def test_structurally_pruned(tmp_path: Path, family: str, widths: str) -> None:
    folder, _ = assembled(tmp_path, family, EVEN if widths == "uniform" else UNEVEN, widths)
    agree(folder, tmp_path / "gguf")


def splitter(steps: tuple[str, ...]) -> Any:
    """The pre-tokenizer that `SPLITTERS` describes by these steps."""
    kinds = {
        "digits": lambda: pre_tokenizers.Digits(individual_digits=True),
        "words of bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    }
    made = [kinds[step]() if step in kinds else pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    return made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)


def same_tokens(model: Path, tokenizer: Tokenizer, out: Path, **special: str) -> None:
    """Give a model this tokenizer; llama.cpp and transformers then split `TEXTS` alike, but for what is said."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(model)
    manifest = export_checkpoint(model, out, "gguf")
    cased = "beyond ASCII" in " ".join(manifest.metrics["gguf"]["limits"])
    found, known = runtime(out), AutoTokenizer.from_pretrained(model)
    for text in TEXTS[:-1] if cased else TEXTS:
        assert found.tokenize(text.encode(), add_bos=True, special=True) == known(text)["input_ids"], text


@pytest.mark.parametrize(
    ("steps", "whole_words"), [(steps, whole) for steps, names in SPLITTERS.items() for whole in names]
)
def test_byte_level_tokenizers(tmp_path: Path, steps: tuple[str, ...], whole_words: bool) -> None:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer, tokenizer.decoder = splitter(steps), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([sample_text(2000), *TEXTS * 3], trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    same_tokens(
        make_pico_llama(tmp_path / "model", vocab_size=640), tokenizer, tmp_path / "out",
        bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


def sentencepiece(prefix: bool) -> Tokenizer:
    """As transformers makes one of a sentencepiece model: scores as merges, bytes for what has no piece."""
    words = [f"▁{word}" for word in sample_text(400).replace(".", " .").split()]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    pieces += sorted({letter for word in words for letter in word})
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                splits = [(word[:at], word[at:end]) for at in range(1, end)]
                merges += [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(tmp_path: Path, prefix: bool) -> None:
    tokenizer = sentencepiece(prefix)
    model = make_pico_llama(tmp_path / "model", vocab_size=tokenizer.get_vocab_size(), bos_token_id=1, eos_token_id=2)
    same_tokens(model, tokenizer, tmp_path / "out", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
