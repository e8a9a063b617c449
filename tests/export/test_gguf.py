"""GGUF files: what transformers' own reader finds in them is the checkpoint; what llama.cpp cannot hold is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crepe_deploy.exporting.formats.gguf import FILE
from crepe_deploy.exporting.llamacpp.weights import BLOCK, TYPES
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file, save_file

from crepe_deploy.cli import run
from crepe_deploy.errors import ConfigError, NoTokenizer, ParityError, UnsupportedModel
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.store.checkpoint import CheckpointReader, read_config, same_bits
from crepe_deploy.store.gguf import check_gguf, convert_gguf
from crepe_deploy.store.manifest import verify
from crepe_deploy.store.sources import resolve_model
from tests.export.sliced import EVEN, assembled
from tests.pico import make_pico_llama
from tests.structural.random_plans import UNEVEN, make_model

DOWN = "model.layers.0.mlp.down_proj.weight"


def exported(model: Path, out: Path, **options: str) -> Any:
    return export_checkpoint(model, out, "gguf", options=options)


def fields(folder: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(str(folder / FILE)).fields.items()}


def configured(folder: Path, **entries: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
    ids=["llama", "llama with biases", "mistral", "qwen2", "qwen3"],
)
def test_transformers_reads_every_bit_back(
    tmp_path: Path, family: str, own: dict[str, Any], dtype: torch.dtype
) -> None:
    """By its own reader of GGUF, which knows nothing of how the file was written."""
    model = make_model(tmp_path / "model", family, dtype, **own)
    manifest = exported(model, tmp_path / "out")
    record = manifest.metrics["gguf"]
    assert record["exact"] and record["parity"]["max_abs_logit_difference"] == 0
    assert len(manifest.metrics["greedy"]["token_ids"]) == 8
    assert verify(tmp_path / "out") == manifest
    assert {path.name for path in (tmp_path / "out").iterdir()} == {FILE, "README.md", "manifest.json"}
    convert_gguf(tmp_path / "out" / FILE, tmp_path / "back", str(dtype).removeprefix("torch."))
    before, after = CheckpointReader(model), CheckpointReader(tmp_path / "back")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(same_bits(before.load(name), after.load(name)) for name in before.tensors)


def test_an_exported_file_is_pruned_like_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_pico_llama(tmp_path / "model", torch.bfloat16)
    exported(model, tmp_path / "gguf")
    for source, out in ((model, "one"), (tmp_path / "gguf" / FILE, "other")):
        assert run(["prune", str(source), "--method", "magnitude", "--out", str(tmp_path / out)]) == 0
    before, after = CheckpointReader(tmp_path / "one"), CheckpointReader(tmp_path / "other")
    assert all(same_bits(before.load(name), after.load(name)) for name in before.tensors)


def test_a_tied_head_is_written_once_and_a_head_of_its_own_is_not_lost(tmp_path: Path) -> None:
    tied = make_pico_llama(tmp_path / "tied", tie_word_embeddings=True)
    exported(tied, tmp_path / "out")
    assert "output.weight" not in {tensor.name for tensor in GGUFReader(str(tmp_path / "out" / FILE)).tensors}
    own = make_pico_llama(tmp_path / "own")
    configured(own, tie_word_embeddings=True)
    exported(own, tmp_path / "own_out")
    assert "output.weight" in {tensor.name for tensor in GGUFReader(str(tmp_path / "own_out" / FILE)).tensors}


@pytest.mark.parametrize("name", [name for name, kind in TYPES.items() if kind.levels])
def test_quantised_weights_are_near_and_pruned_ones_stay_zero(tmp_path: Path, name: str) -> None:
    model = make_pico_llama(tmp_path / "model", torch.bfloat16)
    config = prune_config("magnitude", "2:4")
    options = {"quantise": name}
    report = prune_and_export(
        resolve_model(str(model)), tmp_path / "out", config, None, formats=("dense", "gguf"), options=options
    )
    folder = tmp_path / "out" / "gguf"
    manifest, dense = verify(folder), CheckpointReader(tmp_path / "out" / "dense")
    assert report["formats"]["gguf"]["weight_file_bytes"] == (folder / FILE).stat().st_size
    assert "greedy" not in manifest.metrics and not manifest.metrics["gguf"]["exact"]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(str(folder / FILE)).tensors}
    assert kinds["blk.0.ffn_down.weight"] == TYPES[name].name
    assert kinds["token_embd.weight"] == "Q8_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    down = next(each for each in GGUFReader(str(folder / FILE)).tensors if each.name == "blk.0.ffn_down.weight")
    stored, weight = torch.from_numpy(dequantize(down.data, down.tensor_type)), dense.load(DOWN).float()
    largest = weight.reshape(-1, BLOCK).abs().amax(-1, keepdim=True)
    share = ((stored - weight).reshape(-1, BLOCK).abs() / largest).max()
    assert 0.3 * TYPES[name].error < share <= TYPES[name].error
    assert bool((stored[weight == 0] == 0).all())
    record = manifest.tensors[DOWN]
    assert record.zeros == int((stored == 0).sum()) >= weight.numel() // 2
    assert "quantised as GGUF" in (folder / "README.md").read_text()


def test_rows_that_are_no_blocks_stay_in_half_precision_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_pico_llama(tmp_path / "model", intermediate_size=40)
    assert run(["export", str(model), "--format", "gguf", "--quantise", "q4_0", "--out", str(tmp_path / "out")]) == 0
    assert "2 matrices stay in F16" in capsys.readouterr().out
    assert verify(tmp_path / "out").metrics["gguf"]["types"] == {"Q8_0": 2, "F32": 5, "Q4_0": 12, "F16": 2}


def test_a_uniform_width_folder_is_an_ordinary_file(tmp_path: Path) -> None:
    folder, _ = assembled(tmp_path, "llama", EVEN, "uniform")
    manifest = exported(folder, tmp_path / "gguf")
    assert manifest.metrics["gguf"]["exact"] and manifest.metrics["gguf"]["architecture"] == "llama"
    assert fields(tmp_path / "gguf")["llama.feed_forward_length"] == 32
    assert "heads and neurons" in (tmp_path / "gguf" / "README.md").read_text()
    convert_gguf(tmp_path / "gguf" / FILE, tmp_path / "back", "float32")
    assert read_config(tmp_path / "back")["num_attention_heads"] == 4


def test_qwen2_of_uniform_width_keeps_its_biases(tmp_path: Path) -> None:
    """It is written as Llama with biases, which are easily lost."""
    folder, _ = assembled(tmp_path, "qwen2", EVEN, "uniform")
    exported(folder, tmp_path / "gguf")
    convert_gguf(tmp_path / "gguf" / FILE, tmp_path / "back", "float32")
    before, after = CheckpointReader(folder), CheckpointReader(tmp_path / "back")
    assert all(same_bits(before.load(name), after.load(name)) for name in before.tensors)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_widths_per_layer_are_written_as_deci(tmp_path: Path, family: str) -> None:
    folder, _ = assembled(tmp_path, family, UNEVEN, "per-layer")
    manifest = exported(folder, tmp_path / "gguf")
    assert manifest.metrics["gguf"]["exact"]
    found = fields(tmp_path / "gguf")
    assert found["general.architecture"] == "deci"
    assert found["deci.attention.head_count"] == [8, 2, 3]
    assert found["deci.attention.head_count_kv"] == [4, 1, 3]
    assert found["deci.feed_forward_length"] == [96, 32, 50]


def test_a_packed_folder_is_unpacked(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model", torch.bfloat16)
    config = prune_config("magnitude", "16:32")
    prune_and_export(resolve_model(str(model)), tmp_path / "out", config, None, formats=("packed", "gguf"))
    exported(tmp_path / "out" / "packed", tmp_path / "again")
    one, other = (folder / FILE for folder in (tmp_path / "out" / "gguf", tmp_path / "again"))
    assert one.read_bytes() == other.read_bytes()


STRETCHED = {
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", STRETCHED)
def test_stretched_rotary_embeddings_come_back(tmp_path: Path, kind: str) -> None:
    model = make_pico_llama(tmp_path / "model", rope_parameters=STRETCHED[kind])
    exported(model, tmp_path / "out")
    convert_gguf(tmp_path / "out" / FILE, tmp_path / "back", "float32")
    assert read_config(tmp_path / "back")["rope_parameters"] == STRETCHED[kind]


def test_a_sliding_window_is_the_context(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "mistral", sliding_window=100)
    manifest = exported(model, tmp_path / "out")
    assert fields(tmp_path / "out")["llama.context_length"] == 100
    assert "sliding window" in manifest.metrics["gguf"]["limits"][0]


@pytest.mark.parametrize(
    ("family", "own", "said"),
    [
        ("gemma2", {}, "model type 'gemma2' is not written as GGUF"),
        ("phi3", {}, "model type 'phi3' is not written as GGUF"),
        ("llama", {"hidden_act": "gelu"}, "with silu"),
        ("qwen3", {"attention_bias": True}, "no biases in its attention"),
        ("llama", {"rope_parameters": {**STRETCHED["yarn"], "beta_fast": 16.0}}, "'yarn' with .*beta_fast 16"),
        ("llama", {"rope_parameters": {**STRETCHED["llama3"], "high_freq_factor": 8.0}}, "'llama3' with"),
        ("qwen2", {"rope_parameters": STRETCHED["llama3"]}, "'llama3' with"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic' with"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, family: str, own: dict[str, Any], said: str
) -> None:
    model = make_model(tmp_path / "model", family, **own)
    with pytest.raises(UnsupportedModel, match=said):
        exported(model, tmp_path / "out")
    with pytest.raises(UnsupportedModel, match=said):
        prune_and_export(
            resolve_model(str(model)), tmp_path / "out", prune_config("magnitude", "2:4"), None, formats=("gguf",)
        )
    assert not (tmp_path / "out").exists()


def test_widths_per_layer_of_other_families_are_refused(tmp_path: Path) -> None:
    folder, _ = assembled(tmp_path, "qwen3", UNEVEN, "per-layer")
    with pytest.raises(UnsupportedModel, match="'crepe_qwen3' is not written as GGUF; known: llama"):
        exported(folder, tmp_path / "gguf")


def test_other_refusals(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"--quantise q4_k_m is not written here.*llama-quantize"):
        exported(model, tmp_path / "out", quantise="q4_k_m")
    weights = load_file(model / "model.safetensors")
    weights[DOWN][0, 0] = 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match="beyond what f16 holds"):
        exported(model, tmp_path / "out", quantise="f16")
    exported(model, tmp_path / "bf16", quantise="bf16")
    for path in model.glob("*token*"):
        path.unlink()
    with pytest.raises(NoTokenizer):
        exported(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoilt", ["tensor", "field"])
def test_a_file_that_is_not_what_was_written_is_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    from crepe_deploy.exporting.formats.gguf import Gguf

    def companions(exporter: Gguf, plan: Any, weights: Path, folder: Path) -> None:
        content = bytearray((folder / FILE).read_bytes())
        place = len(content) - 100 if spoilt == "tensor" else content.index(b"general.description") + 35
        content[place] ^= 1
        (folder / FILE).write_bytes(content)

    monkeypatch.setattr(Gguf, "companions", companions)
    model = make_pico_llama(tmp_path / "model")
    with pytest.raises(ParityError, match="other bits" if spoilt == "tensor" else "not what was written"):
        exported(model, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.failed" / FILE).is_file()


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    model = make_pico_llama(tmp_path / "Pico-1M", torch.bfloat16)
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (model / "LICENSE").write_text("MIT")
    exported(model, tmp_path / "out")
    found = fields(tmp_path / "out")
    assert (found["general.name"], found["general.license"], found["general.file_type"]) == ("Pico-1M", "mit", 32)
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"
    info = check_gguf(tmp_path / "out" / FILE)
    assert info.quantisation == {"BF16": 16, "F32": 5} and info.licence == "mit"
    assert np.prod(found["llama.vocab_size"]) == len(found["tokenizer.ggml.tokens"]) == 320
