"""Run inside a vLLM process: the quantization method's own checks, one by one. An error is a failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crepe_deploy.errors import CheckpointError, ConfigError


def refused(kind: type[Exception], part: str, call: Callable[..., object], *arguments: Any) -> None:
    """Whether the call raises this kind of error, with this part in its message."""
    try:
        call(*arguments)
    except kind as error:
        assert part in str(error), error
    else:
        raise AssertionError(part)


def main() -> None:
    from crepe_deploy.serve.vllm_plugin import register

    register()
    register()  # vLLM may call it more than once
    import torch
    from crepe_deploy.serve.vllm_packed import CrepeNmConfig, CrepeNmLinearMethod, _load_guard, _load_whole
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization import get_quantization_config

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

    mixed = "model.layers.1.self_attn.qkv_proj"
    uneven = base | {"version": 2, "ignore": [], "overrides": {"model.layers.0.self_attn.q_proj": {"n": 1, "m": 4}}}
    uneven = CrepeNmConfig.from_config(uneven)
    uneven.packed_modules_mapping = config.packed_modules_mapping
    layer = object.__new__(LinearBase)
    refused(ConfigError, "different patterns", uneven.get_quant_method, layer, "model.layers.0.self_attn.qkv_proj")
    assert str(uneven.get_quant_method(layer, "model.layers.1.self_attn.qkv_proj").packed.pattern) == "2:4"
    refused(ConfigError, "only model.layers.1.self_attn.q_proj is dense", config.is_dense, mixed)
    refused(CheckpointError, "version 7 is newer", CrepeNmConfig.from_config, base | {"version": 7, "ignore": []})
    coded = base | {"version": 3, "ignore": [], "values": {"bits": 4, "group": 128}}
    refused(ConfigError, "vLLM cannot serve int4:group=128 values", CrepeNmConfig.from_config, coded)
    method = CrepeNmLinearMethod(config.packed, "model.layers.0.mlp.down_proj")
    refused(ConfigError, "smaller tensor-parallel size", method._check_shard, 16, 32, 4)
    refused(ConfigError, "do not fit", method._check_shard, 48, 48, 4)
    refused(CheckpointError, "dense weight (2, 2)", _load_guard, None, torch.ones(2, 2), "q")
    refused(CheckpointError, "expected (2, 2)", _load_whole, torch.nn.Parameter(torch.ones(2, 2)), torch.ones(2, 4))
    values, mask = torch.full((4, 16), float("nan")), torch.zeros((4, 4), dtype=torch.uint8)
    refused(CheckpointError, "weight_values was not in", method._check_loaded, None, values, mask)
    refused(CheckpointError, "weight_mask was not in", method._check_loaded, None, torch.ones(4, 16), mask)
    refused(CheckpointError, "row 0", method._check_loaded, None, torch.ones(4, 16), mask + 7)


main()
