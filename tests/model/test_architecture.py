"""Configurations of strangers: nothing is built that the files do not bear out, and every spoilt entry is an answer."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from crepe_deploy.cli import run
from crepe_deploy.errors import CheckpointError, UnsupportedModel
from crepe_deploy.model.architecture import content_with_sizes, load_config, outline, whole_model
from crepe_deploy.model.decoder import Decoder
from tests.mutations import mutations
from tests.pico import VOCAB, make_pico, make_pico_llama, pico_llama_config, sample_text

SPOILT: tuple[Any, ...] = (None, True, "", -1, 0, 3, 2**40, 2**70, 1e308, 0.5, [], {}, "x")
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1}
WIDTHS: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **SIZES}
CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": pico_llama_config,
    "gpt2": lambda: tf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, **SIZES),
    "gemma3": lambda: tf.Gemma3TextConfig(
        intermediate_size=128, num_key_value_heads=2, head_dim=16, sliding_window=32, pad_token_id=1, **WIDTHS
    ),
    "opt": lambda: tf.OPTConfig(ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=128, **WIDTHS),
}
ALL = 40  # shares of the sweep, of which one is run unless all are asked for


def change(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sample_text(2000))
    return path


@pytest.mark.parametrize("share", [0, *(pytest.param(n, marks=pytest.mark.faults) for n in range(1, ALL))])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_spoilt_entry_of_a_configuration_is_taken_or_refused(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str], family: str, share: int
) -> None:
    model = make_pico(tmp_path / "m", CONFIGS[family]())
    path, calibration = model / "config.json", ["--calib", str(text), "--calib-samples", "2", "--calib-length", "32"]
    for number, (what, changed) in enumerate(mutations(json.loads(path.read_text()), SPOILT)):
        if number % ALL != share:
            continue
        path.write_text(json.dumps(changed))
        out = str(tmp_path / f"out{number}")
        for command in (
            ["plan", str(model)],
            ["prune", str(model), "--out", f"{out}c", *calibration],
            ["prune-and-export", str(model), "--out", f"{out}m", "--method", "magnitude", "--format", "dense,int8"],
            ["eval", str(model), "--text", str(text), "--window", "32", "--max-tokens", "64"],
        ):
            code, said = run(command), capsys.readouterr().err
            assert code in (0, 1, 2) and "unexpected" not in said, (what, command, said)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20  # KiB, of everything that this process ran


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 9_999}, "far more tensors than the files hold"),
        ({"num_hidden_layers": 3}, "tensor 'model.layers.2.* is missing"),
        ({"hidden_size": 2**30}, r"config.json asks for \(320, 1073741824\)"),
        ({"intermediate_size": 2**40}, "config.json asks for"),
        ({"num_attention_heads": 0}, "without 'num_attention_heads'"),
        ({"num_attention_heads": 3}, "without 'num_attention_heads'"),
        ({"hidden_act": "unheard"}, "without 'hidden_act'"),
        ({"rope_parameters": {"rope_type": "unheard"}}, "rope_"),
        ({"max_position_embeddings": 0}, "'max_position_embeddings' is 0"),
    ],
)  # fmt: skip
def test_a_configuration_that_the_files_do_not_bear_out_is_refused(
    tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    model = make_pico_llama(tmp_path / "m")
    change(model, **entries)
    with pytest.raises((UnsupportedModel, CheckpointError), match=message):
        Decoder(model)


def test_sizes_that_a_configuration_leaves_out_are_its_familys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_pico_llama(tmp_path / "m", num_attention_heads=32, num_key_value_heads=32)
    path = model / "config.json"
    content = json.loads(path.read_text())
    del content["num_attention_heads"]
    path.write_text(json.dumps(content))
    assert content_with_sizes(model, load_config(model)) == {**content, "num_attention_heads": 32}
    del content["intermediate_size"]
    path.write_text(json.dumps(content))
    text = tmp_path / "text.txt"
    text.write_text(sample_text(2000))
    calibration = ["--calib", str(text), "--calib-samples", "2", "--calib-length", "32"]
    assert run(["tyr", str(model), "--out", str(tmp_path / "out"), *calibration]) == 2
    assert "config.json asks for" in capsys.readouterr().err


def test_tables_that_no_file_bears_out_are_bounded(tmp_path: Path) -> None:
    config = tf.XGLMConfig(
        d_model=64, ffn_dim=128, num_layers=2, attention_heads=4, max_position_embeddings=64, **SIZES
    )
    model = make_pico(tmp_path / "m", config)
    change(model, max_position_embeddings=2**30)
    with pytest.raises(UnsupportedModel, match="it asks for tables like"):
        Decoder(model)


def test_an_outline_costs_nothing_and_leaves_the_configuration_alone(tmp_path: Path) -> None:
    pico_llama_config(hidden_size=16384, intermediate_size=65536, dtype="bfloat16").save_pretrained(tmp_path)
    config = load_config(tmp_path)
    before = config.to_dict()
    made = outline(tmp_path, config, 100)
    assert all(part.is_meta for part in (*made.parameters(), *made.buffers()))
    assert config.to_dict() == before


HARMLESS: tuple[dict[str, Any], ...] = (
    {"quantization_config": None},
    {"_attn_implementation": "flash_attention_2"},
    {"attn_implementation": "flash_attention_3"},
    {"torch_dtype": None},
)


@pytest.mark.parametrize("entries", HARMLESS)
def test_entries_that_change_nothing_change_nothing(tmp_path: Path, entries: dict[str, Any]) -> None:
    model = make_pico_llama(tmp_path / "m")
    tokens = torch.arange(2, 10)[None]
    expected = whole_model(model)(tokens).logits
    change(model, **entries)
    assert torch.equal(whole_model(model)(tokens).logits, expected)
    assert run(["prune", str(model), "--out", str(tmp_path / "out"), "--method", "magnitude"]) == 0


def test_fp8_weights_without_a_word_in_the_configuration_are_refused_by_name(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_pico_llama(tmp_path / "m")
    path = model / "model.safetensors"
    tensors = {name: t.to(torch.float8_e4m3fn) if "_proj" in name else t for name, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    for command in (
        ["plan", str(model)],
        ["prune", str(model), "--out", str(tmp_path / "out"), "--method", "magnitude"],
        ["eval", str(model), "--text", str(text)],
    ):
        assert run(command) == 2
        assert "_proj.weight' holds float8_e4m3fn" in capsys.readouterr().err


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "m")
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="LoRA adapter"):
        whole_model(model)


def test_experts_behind_a_dense_first_block_are_refused_by_name(tmp_path: Path) -> None:
    widths = {name: size for name, size in WIDTHS.items() if name != "num_attention_heads"}
    config = tf.Qwen2MoeConfig(
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, shared_expert_intermediate_size=32, mlp_only_layers=[0], **widths,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="experts"):
        Decoder(make_pico(tmp_path / "m", config))
