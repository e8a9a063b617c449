"""Configurations and tokenizers of strangers: what transformers makes of them, or one named error."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from crepe_deploy.errors import CheckpointError, CrepeError, NoTokenizer, UnsupportedModel
from crepe_deploy.store.stock import config_of, third_party, tokenizer_of
from tests.mutations import mutations
from tests.pico import make_pico_llama


@pytest.fixture
def pico(tmp_path: Path) -> Path:
    return make_pico_llama(tmp_path / "m")


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_what_says_how_a_machine_computes_is_not_the_models(pico: Path) -> None:
    change(
        pico / "config.json", _attn_implementation="flash_attention_2", attn_implementation="stranger/kernel",
        quantization_config=None, auto_map={"AutoConfig": "code.Config"},
    )  # fmt: skip
    config = config_of(pico)
    assert config._attn_implementation is None
    assert not hasattr(config, "auto_map") and not hasattr(config, "quantization_config")


def test_floats_that_json_cannot_hold_are_read_as_transformers_writes_them(pico: Path) -> None:
    change(pico / "config.json", some_limit=[0.0, {"__float__": "Infinity"}])
    assert config_of(pico).some_limit == [0.0, float("inf")]


@pytest.mark.parametrize(
    ("entries", "named"),
    [
        ({"num_hidden_layers": 50_000}, "'num_hidden_layers' is 50000"),
        ({"text_config": {"n_layer": 2**40}}, "'n_layer' is 1099511627776"),
        ({"num_labels": 10**8}, "'num_labels' is 100000000"),
        ({"torch_dtype": "float8_e4m3fn"}, "'torch_dtype' is 'float8_e4m3fn'"),
        ({"dtype": "load"}, "'dtype' is 'load'"),
        ({"dtype": {"": "float32"}}, "'dtype' is"),
        ({"attention_dropout": -1}, "'attention_dropout' is -1"),
        ({"model_type": ["llama"]}, "'model_type' is"),
        ({"model_type": "unheard"}, "'unheard' is not known"),
        ({"hidden_act": 3}, "'hidden_act'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": "x"}}, "rope_parameters"),
    ],
)
def test_the_entry_at_fault_is_named(pico: Path, entries: dict[str, Any], named: str) -> None:
    change(pico / "config.json", **entries)
    with pytest.raises(UnsupportedModel) as caught:
        config_of(pico)
    assert named in str(caught.value) and str(pico / "config.json") in str(caught.value)


def test_a_panic_and_advice_to_run_code_become_one_line() -> None:
    class Panic(BaseException):
        pass

    with pytest.raises(CheckpointError, match=r"^here: Panic: a b$"), third_party("here", CheckpointError):
        raise Panic("a\n  b")
    advice = pytest.raises(CheckpointError, match=r"^here: it needs code from the checkpoint, which is never run$")
    with advice, third_party("here", CheckpointError):
        raise ValueError("please pass trust_remote_code=True")
    with pytest.raises(KeyboardInterrupt), third_party("here", CheckpointError):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "opt", "gpt_neox", "phi", "olmo", "cohere", "starcoder2", "gemma3_text"]
)
def test_a_folder_without_a_vocabulary_has_no_tokenizer(pico: Path, model_type: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pico / name).unlink()
    (pico / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 320}))
    with pytest.raises(NoTokenizer, match="has no tokenizer"):
        tokenizer_of(pico)


@pytest.mark.parametrize("kept", [0, 1, 100, 3000, -2])
def test_a_truncated_tokenizer_is_damaged(pico: Path, kept: int) -> None:
    path = pico / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="no tokenizer that transformers can load") as caught:
        tokenizer_of(pico)
    assert not isinstance(caught.value, NoTokenizer)


def test_a_pipe_among_the_files_is_refused(pico: Path) -> None:
    os.mkfifo(pico / "vocab.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        tokenizer_of(pico)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.faults) for part in range(1, 8))])
def test_a_tokenizer_that_is_valid_json_and_wrong_works_or_is_refused(pico: Path, name: str, part: int) -> None:
    path = pico / name
    content = json.loads(path.read_text())
    if name == "tokenizer.json":
        content["model"]["vocab"] = dict(list(content["model"]["vocab"].items())[:3])
    for number, (what, changed) in enumerate(mutations(copy.deepcopy(content))):
        if number % 8 != part:
            continue
        path.write_text(json.dumps(changed))
        try:
            tokenizer_of(pico)
        except CrepeError:
            continue
        except BaseException as error:
            raise AssertionError(what) from error


def test_an_id_beyond_any_vocabulary_is_refused_before_room_is_made_for_it(pico: Path) -> None:
    path = pico / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["vocab"]["the"] = 2**32 - 1
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="the id 4294967295"):
        tokenizer_of(pico)
