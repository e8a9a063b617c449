"""Zero-shot accuracy from local task files, offline."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from transformers import AutoModelForCausalLM

from crepe_deploy.errors import CalibrationError, CheckpointError, ConfigError, CrepeError, MissingExtra
from crepe_deploy.quality.zeroshot import Document, find_task_file, read_task_file, zero_shot
from tests.pico import make_pico_llama, pico_tokenizer

QUESTIONS = [
    ("the first city is", ["the world", "a state that they know", "out"], 0),
    ("there was a time when", ["it was most", "all of them had been there"], 1),
    ("one of the years", ["more", "two years after the other", "who", "later"], 2),
    ("but after all", ["he has had some", "national school"], 0),
    ("this would be where", ["up", "they use it"], 1),
]


def rows(questions: list[tuple[str, list[str], int]], first: int = 0) -> list[dict[str, Any]]:
    return [
        {"doc_id": first + index, "label": gold, "request": {"context": context, "continuation": f" {choice}"}}
        for index, (context, choices, gold) in enumerate(questions)
        for choice in choices
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    def write_task(lines: list[dict[str, Any]]) -> Path:
        path = tmp_path / "tiny.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")
        return path

    return write_task


def by_hand(model_dir: Path) -> dict[str, float]:
    """acc and acc_norm by a plain loop."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), pico_tokenizer()
    right = {"acc": 0, "acc_norm": 0}
    for context, choices, gold in QUESTIONS:
        scores = []
        for choice in choices:
            prompt, whole = (tokenizer(part).input_ids for part in (context, f"{context} {choice}"))
            with torch.no_grad():
                logits = torch.log_softmax(model(torch.tensor([whole])).logits[0].float(), -1)
            scores.append(sum(logits[at - 1, whole[at]].item() for at in range(len(prompt), len(whole))))
        normed = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        right["acc"] += scores.index(max(scores)) == gold
        right["acc_norm"] += normed.index(max(normed)) == gold
    return {name: count / len(QUESTIONS) for name, count in right.items()}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"doc_id": 9}, "line 3 is no choice"),
        ({"doc_id": 9, "label": "x", "request": {"context": "a", "continuation": " b"}}, "line 3 is no choice"),
        (
            {"doc_id": 9, "label": 0, "request": {"context": "a", "continuation": " b"}},
            "document 9 has one choice and others have several",
        ),
        (
            {"doc_id": 0, "label": ["x"], "request": {"context": "c", "continuation": " z"}},
            "differ in context or label",
        ),
        (
            {"doc_id": 0, "label": 0, "request": {"context": "other", "continuation": " b"}},
            "differ in context or label",
        ),
    ],
)
def test_bad_rows_are_named(write: Callable[[list[dict[str, Any]]], Path], line: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_task_file(write([*rows([("c", ["x", "y"], 0)]), line]))


def test_a_label_out_of_range_and_an_empty_file(write: Callable[[list[dict[str, Any]]], Path]) -> None:
    with pytest.raises(CalibrationError, match="label 2 names none of its 2 choices"):
        read_task_file(write(rows([("c", ["x", "y"], 2)])))
    with pytest.raises(CalibrationError, match="holds no documents"):
        read_task_file(write(rows([("c", ["x", "y"], 0)], first=1_000_000)))


def test_bad_json_bad_bytes_and_a_truncated_archive(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"doc_id": 0\n')
    with pytest.raises(CalibrationError, match="line 1 is not JSON"):
        read_task_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationError, match="not UTF-8: byte 0xff at offset 0"):
        read_task_file(path)
    packed = tmp_path / "bad.jsonl.gz"
    for content in (gzip.compress(b"x" * 1000)[:-12], b"plain"):
        packed.write_bytes(content)
        with pytest.raises(CalibrationError, match="cannot read"):
            read_task_file(packed)


def test_unknown_tasks_list_the_known(tmp_path: Path, write: Callable[[list[dict[str, Any]]], Path]) -> None:
    write(rows(QUESTIONS))
    with pytest.raises(ConfigError, match=r"'huge' is not in .*; there: tiny"):
        find_task_file(tmp_path, "huge")
    with pytest.raises(ConfigError, match="does not exist"):
        find_task_file(tmp_path / "none", "huge")
    with pytest.raises(ConfigError, match="no task is named"):
        zero_shot(tmp_path, [])


def test_a_task_that_lm_eval_does_not_know_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty:  # reading lm-eval's own thousands of task files takes seconds
        all_tasks = ("arc_easy",)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: Empty())
    with pytest.raises(ConfigError, match="knows no task named no_such_task; for local files give --task-dir"):
        zero_shot(tmp_path, ["arc_easy", "no_such_task"])


def test_missing_lm_eval_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"lm-eval.*crepe-deploy\[eval\]"):
        zero_shot(tmp_path, ["tiny"])


def test_a_missing_model_is_named(tmp_path: Path, write: Callable[[list[dict[str, Any]]], Path]) -> None:
    write(rows(QUESTIONS))
    with pytest.raises(CheckpointError, match="not a model folder"):
        zero_shot(tmp_path / "none", ["tiny"], task_dir=tmp_path)


def test_documents_are_grouped_and_extra_ones_dropped(tmp_path: Path) -> None:
    lines = rows([("c", ["x", "y"], 1)]) + rows([("d", ["z", "w"], 0)], first=1_000_000)
    folder = tmp_path / "task" / "variant"
    folder.mkdir(parents=True)
    path = folder / "requests.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    assert find_task_file(tmp_path, "task/variant") == path
    assert read_task_file(path) == [Document("c", (" x", " y"), 1)]


def test_accuracy_matches_a_plain_loop_and_pairs_with_a_reference(
    tmp_path: Path, write: Callable[[list[dict[str, Any]]], Path]
) -> None:
    write(rows(QUESTIONS))
    model = make_pico_llama(tmp_path / "a", seed=1)
    other = make_pico_llama(tmp_path / "b", seed=2)
    report = zero_shot(model, ["tiny"], task_dir=tmp_path, against=other)
    score = report.tasks["tiny"]
    ours, theirs = by_hand(model), by_hand(other)
    assert score.documents == 5
    assert score.reference is not None and score.difference is not None
    for name in ("acc", "acc_norm"):
        assert score.metrics[name].value == pytest.approx(ours[name])
        assert score.metrics[name].stderr is not None
        assert score.reference[name].value == pytest.approx(theirs[name])
        assert score.difference[name].value == pytest.approx(ours[name] - theirs[name])
    assert json.loads(json.dumps(report.to_dict()))["few_shot"] == 0


def test_limit_takes_the_first_documents(tmp_path: Path, write: Callable[[list[dict[str, Any]]], Path]) -> None:
    write(rows(QUESTIONS))
    report = zero_shot(make_pico_llama(tmp_path / "a"), ["tiny"], task_dir=tmp_path, limit=2)
    assert report.tasks["tiny"].documents == 2
    assert report.tasks["tiny"].difference is None


@pytest.mark.parametrize("own_tokens", [True, False], ids=["its own tokens", "words after a space"])
def test_a_continuation_task_counts_what_greedy_decoding_gives(
    tmp_path: Path, write: Callable[[list[dict[str, Any]]], Path], capsys: pytest.CaptureFixture[str], own_tokens: bool
) -> None:
    folder = make_pico_llama(tmp_path / "a", seed=1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), pico_tokenizer()
    lines, losses, greedy = [], [], []
    for index, (context, choices, _) in enumerate(QUESTIONS):
        prompt = tokenizer(context).input_ids
        with torch.no_grad():
            own = tokenizer.decode(int(model(torch.tensor([prompt])).logits[0, -1].argmax()))
        # A token that does not survive decoding and encoding cannot be written as text: a plain word instead.
        survives = own_tokens and tokenizer(context + own).input_ids[:-1] == prompt
        continuation = own if survives else f" {choices[0]}"
        whole = tokenizer(context + continuation).input_ids
        with torch.no_grad():
            logits = torch.log_softmax(model(torch.tensor([whole])).logits[0].float(), -1)
        places = range(len(prompt), len(whole))
        losses.append(sum(logits[at - 1, whole[at]].item() for at in places))
        greedy.append(all(int(logits[at - 1].argmax()) == whole[at] for at in places))
        request = {"context": context, "continuation": continuation}
        lines.append({"doc_id": index, "label": [continuation.strip()], "request": request})
    assert any(greedy) == own_tokens
    path = write(lines)
    assert all(document.gold == 0 and len(document.choices) == 1 for document in read_task_file(path))
    metrics = zero_shot(folder, ["tiny"], task_dir=tmp_path).tasks["tiny"].metrics
    assert capsys.readouterr().out == ""  # lm-eval announces its bootstrap of the perplexity
    assert metrics["acc"].value == pytest.approx(sum(greedy) / len(greedy))
    assert metrics["perplexity"].value == pytest.approx(math.exp(-sum(losses) / len(losses)), rel=1e-4)


def test_a_choice_without_an_index_is_named(write: Callable[[list[dict[str, Any]]], Path]) -> None:
    lines = [{**row, "label": ["x"]} for row in rows([("c", ["x", "y"], 0)])]
    with pytest.raises(CalibrationError, match="label None names none of its 2 choices"):
        read_task_file(write(lines))


def _tokenizer_without(model: Path, *names: str) -> None:
    """Drop special tokens from what the folder says of its tokenizer."""
    file = model / "tokenizer_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in content.items() if name not in names}))


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ("  ", " they know", "its prompt '  ' is blank"),
        ("one of", " of" * 600, r"a choice of \d+ tokens is longer than the model's context of 64"),
    ],
)
def test_what_lm_eval_would_assert_is_said_with_the_document(
    tmp_path: Path, write: Callable[[list[dict[str, Any]]], Path], context: str, continuation: str, message: str
) -> None:
    model = make_pico_llama(tmp_path / "m", max_position_embeddings=64)
    lines = rows(QUESTIONS[:2])
    lines += [{"doc_id": 7, "label": 0, "request": {"context": context, "continuation": continuation}}]
    lines += [{"doc_id": 7, "label": 0, "request": {"context": context, "continuation": " out"}}]
    with pytest.raises(CalibrationError, match=f"task tiny, document 2: {message}"):
        zero_shot(model, ["tiny"], task_dir=write(lines).parent)


def test_a_tokenizer_without_bos_and_eos_is_refused_before_the_model_is_read(
    tmp_path: Path, write: Callable[[list[dict[str, Any]]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_pico_llama(tmp_path / "m")
    task_dir = write(rows(QUESTIONS)).parent
    _tokenizer_without(model, "bos_token", "pad_token")
    assert zero_shot(model, ["tiny"], task_dir=task_dir).tasks["tiny"].documents == 5
    _tokenizer_without(model, "eos_token")
    monkeypatch.setattr("crepe_deploy.quality.zeroshot.load_model", None)
    with pytest.raises(CheckpointError, match=r"m: its tokenizer has neither BOS nor EOS.*tokenizer_config\.json"):
        zero_shot(model, ["tiny"], task_dir=task_dir)


def test_what_else_lm_eval_raises_is_one_line(
    tmp_path: Path, write: Callable[[list[dict[str, Any]]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("raw")

    monkeypatch.setattr("lm_eval.evaluator.evaluate", fail)
    model = make_pico_llama(tmp_path / "m")
    with pytest.raises(CrepeError, match=r"lm-eval cannot judge .*AssertionError: raw"):
        zero_shot(model, ["tiny"], task_dir=write(rows(QUESTIONS)).parent)
