"""The model types are known to transformers whatever was imported first; each import order in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from crepe_deploy.errors import UnsupportedModel
from crepe_deploy.model.architecture import load_config

CONTENT = {
    "model_type": "crepe_qwen3",
    "architectures": ["CrepeQwen3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "per_layer_config": {"1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}},
}
LOAD = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_config(config)
print(type(model).__name__, [tuple(layer.mlp.up_proj.weight.shape) for layer in model.model.layers])
"""


def write(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONTENT, **changes}))
    return folder


@pytest.mark.parametrize(
    "first",
    [
        "import crepe_deploy; from transformers import LlamaConfig",
        "import crepe_deploy; import transformers.models.qwen3.modeling_qwen3",
        "from transformers import AutoConfig; import crepe_deploy",
        "from crepe_deploy.structural import modeling_crepe",
    ],
)
def test_any_order_of_imports_will_do(tmp_path: Path, first: str) -> None:
    command = [sys.executable, "-P", "-c", f"{first}\n{LOAD}", str(write(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.stdout.strip() == "CrepeQwen3ForCausalLM [(96, 64), (32, 64)]", done.stderr[-2000:]


def test_importing_us_does_not_import_transformers() -> None:
    code = "import sys, crepe_deploy; assert not {'transformers', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({"1": {"num_attention_heads": 3, "num_key_value_heads": 2}}, "layer 1: 3 query heads, 2 KV heads"),
        ({"1": {"intermediate_size": 0}}, "0 neurons"),
        ({"7": {"intermediate_size": 32}}, "layer indices"),
    ],
)
def test_layers_that_cannot_be_are_refused(tmp_path: Path, entry: object, part: str) -> None:
    with pytest.raises(UnsupportedModel, match=part):
        load_config(write(tmp_path, per_layer_config=entry))


def test_the_configuration_reads_back_as_it_was_written(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(write(tmp_path))
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert [layer.intermediate_size for layer in again.per_layer_config] == [96, 32]
    with pytest.raises(RuntimeError, match="per-layer attribute"):  # rather than one layer's width taken for all
        _ = again.intermediate_size


def test_a_phi3_configuration_is_checked_without_one_head_count(tmp_path: Path) -> None:
    rotary = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = AutoConfig.from_pretrained(write(tmp_path, model_type="crepe_phi3", pad_token_id=1, rope_scaling=rotary))
    config.validate_rope()
    assert config.head_dim == 8 and [layer.num_attention_heads for layer in config.per_layer_config] == [8, 2]
