"""Layers of codes and scales compute with the numbers of the dense checkpoint, in any dtype, and refuse by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as tf
from crepe_deploy.exporting.pipeline import export_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from crepe_deploy.errors import CheckpointError, ConfigError, KernelError
from crepe_deploy.grid import Grid, round_to_nearest
from crepe_deploy.packed import coded_linear, parts
from crepe_deploy.packed.coded_linear import CodedLinear
from crepe_deploy.packed.config import PackedConfig, Values
from crepe_deploy.pattern import NM, Unstructured
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.select import select
from crepe_deploy.store.manifest import load_manifest
from crepe_deploy.store.sources import resolve_model
from tests.pico import make_pico_llama

BF16 = torch.bfloat16
TOKENS = torch.arange(2, 30)[None]
CONFIGS = {
    "int4 under 16:32": PackedConfig(NM(16, 32), values=Values(4, 64)),
    "int4 under 13:32": PackedConfig(NM(13, 32), values=Values(4, 128)),
    "int8 under 2:4": PackedConfig(NM(2, 4), values=Values(8, None)),
    "int4 of 0.7": PackedConfig(Unstructured(0.7), values=Values(4, 32)),
    "int4 dense": PackedConfig(Unstructured(0), values=Values(4, 128)),
    "int8 dense": PackedConfig(Unstructured(0), values=Values(8, None)),
}


def weight_of(config: PackedConfig, dtype: torch.dtype, rows: int = 37, columns: int = 192) -> tuple[Tensor, Tensor]:
    """A weight on the config's grid, and its scales."""
    assert config.values is not None
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / 50
    grid = Grid(config.values.bits, config.values.group, dtype)
    found = round_to_nearest(weight, select(weight.abs(), config.pattern), grid)
    return found.weight.to(dtype), found.scales


def layer_of(config: PackedConfig, dtype: torch.dtype, bias: Tensor | None = None) -> tuple[CodedLinear, Tensor]:
    weight, scales = weight_of(config, dtype)
    layer = CodedLinear(weight.shape[1], weight.shape[0], bias is not None, config, dtype, dtype)
    found = {f"weight{suffix}": part for suffix, part in parts.stored(weight, scales, config, "w").items()}
    layer.load_state_dict(found | ({} if bias is None else {"bias": bias}))
    layer.check("w")
    return layer, weight


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_layer_is_its_dense_weight(config: PackedConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = torch.randn(37).to(dtype)
    layer, weight = layer_of(config, dtype, bias)
    assert torch.equal(layer.to_dense(), weight)
    for shape in ((192,), (1, 192), (2, 3, 192), (0, 192)):
        x = torch.randn(shape).to(dtype)
        expected = torch.nn.functional.linear(x, weight, bias)
        assert torch.equal(layer(x), expected)
        monkeypatch.setattr(coded_linear, "BLOCK", 192 * 5)  # eight blocks, the last of two rows
        torch.testing.assert_close(layer(x), expected)
        monkeypatch.undo()


def test_a_cast_model_keeps_its_weights() -> None:
    layer, weight = layer_of(CONFIGS["int4 under 16:32"], BF16)
    x = torch.randn(3, 192)
    assert torch.equal(layer.float()(x), torch.nn.functional.linear(x, weight.float()))
    assert torch.equal(layer.half()(x.half()), torch.nn.functional.linear(x.half(), weight.half()))
    assert layer.weight_scales.dtype == BF16 and torch.equal(layer.to_dense(), weight)


def test_one_graph_with_a_dynamic_batch() -> None:
    layer, weight = layer_of(CONFIGS["int8 under 2:4"], torch.float32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (1, 5):
        x = torch.randn(tokens, 192)
        torch.testing.assert_close(compiled(x), torch.nn.functional.linear(x, weight))


def test_what_a_layer_does_not_do_is_refused() -> None:
    layer, _ = layer_of(CONFIGS["int4 under 16:32"], BF16)
    with pytest.raises(KernelError, match=r"x is \(2, 64\), the weight 37 x 192"):
        layer(torch.zeros(2, 64))
    with pytest.raises(KernelError, match=r"int4:group=64 values run on the CPU, not on cuda:1.*--format dense"):
        coded_linear.require_place(torch.device("cuda:1"), layer.config)
    layer, _ = layer_of(CONFIGS["int4 under 16:32"], BF16)
    layer.weight_scales.data[3, 1] = torch.nan
    with pytest.raises(CheckpointError, match="w_scales: a scale is not a finite number"):
        layer.check("w")


def folders(tmp_path: Path, pattern: str, values: str, dtype: torch.dtype = BF16) -> tuple[Path, Path]:
    """A dense folder with scales beside it, and its packed twin."""
    config = prune_config("magnitude", pattern, values=f"{values},rounding=nearest")
    prune(resolve_model(str(make_pico_llama(tmp_path / "model", dtype))), tmp_path / "dense", config, None)
    export_checkpoint(tmp_path / "dense", tmp_path / "packed", "packed")
    return tmp_path / "dense", tmp_path / "packed"


def load(folder: Path, **options: object) -> tf.PreTrainedModel:
    model: tf.PreTrainedModel = tf.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    return model


@torch.inference_mode()
def logits(model: tf.PreTrainedModel) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("pattern", "values", "dtype"),
    [("16:32", "int4:group=32", BF16), ("2:4", "int8:damping=0.01", torch.float32), ("0", "int4:group=128", BF16)],
)
def test_transformers_answers_as_the_dense_folder(
    tmp_path: Path, pattern: str, values: str, dtype: torch.dtype
) -> None:
    dense, packed = folders(tmp_path, pattern, values, dtype)
    expected, model = load(dense), load(packed)
    layers = [module for module in model.modules() if isinstance(module, CodedLinear)]
    assert len(layers) == 14 and model.dtype == dtype
    assert torch.equal(logits(model), logits(expected))
    for options in ({"dtype": torch.float32}, {"dtype": torch.float16}):
        assert torch.equal(logits(load(packed, **options)), logits(load(dense, **options)))
    greedy = load_manifest(packed).metrics["greedy"]
    asked = torch.tensor([greedy["prompt_token_ids"]])
    answer = load(packed, dtype=torch.float32).generate(asked, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert answer[0, asked.shape[1] :].tolist() == greedy["token_ids"]

    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "saved"))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and before[name].equal(after[name]) for name in before)
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_damage_and_other_devices_are_refused_by_name(tmp_path: Path) -> None:
    _, packed = folders(tmp_path, "16:32", "int4:group=32")
    with pytest.raises(ConfigError, match="cuda:0: int4:group=32 values run on the CPU; load with device_map='cpu'"):
        load(packed, device_map={"": "cuda:0"})
    assert load(packed, device_map="auto").device.type == "cpu"
    name, file = "model.layers.1.mlp.up_proj.weight", packed / "model.safetensors"
    whole = load_file(file)
    for part in ("_codes", "_scales", "_mask"):
        save_file({key: value for key, value in whole.items() if key != name + part}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=f"up_proj.weight{part}' is missing"):
            load(packed)
    spoilt = {**whole, name + "_mask": whole[name + "_mask"] ^ 1}
    save_file(spoilt, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight_mask: row 0"):
        load(packed)
