"""The DeciLM layout of a model with widths per layer: the same model, padded; what it cannot hold is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from crepe_deploy.exporting.pipeline import export_checkpoint, prune_and_export
from safetensors.torch import load_file

from crepe_deploy.errors import ConfigError, UnsupportedModel
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.pruning.prune import prune
from crepe_deploy.store.checkpoint import read_config
from crepe_deploy.store.manifest import verify
from crepe_deploy.store.sources import resolve_model
from tests.export.sliced import EVEN, assembled, load, logits, plain, same
from tests.structural.random_plans import UNEVEN

READ_DECI = """
import sys
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
blocks = config.block_configs
heads = config.num_attention_heads
print([(heads // block.attention.n_heads_in_group, block.ffn.intermediate_size) for block in blocks])
assert not blocks[0].attention.no_op
assert not hasattr(blocks[0].ffn, "ffn_mult") and not hasattr(blocks[0].ffn, "hidden_act")
config.save_pretrained(sys.argv[3])
"""


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_decilm_layout_holds_the_same_model_padded(tmp_path: Path, family: str) -> None:
    out, expected = assembled(tmp_path, family, UNEVEN, "per-layer")
    export_checkpoint(out, tmp_path / "deci", "deci")
    manifest = verify(tmp_path / "deci")
    assert manifest.config["structural"]["padded_to"] == [[8, 4, 96], [8, 1, 32], [8, 4, 50]]
    assert manifest.format == "deci" and manifest.metrics["greedy"] == verify(out).metrics["greedy"]
    sizes = [
        tensor.numel()
        for name, tensor in load_file(tmp_path / "deci" / "model.safetensors").items()
        if "layers." in name
    ]
    dense = [
        tensor.numel()
        for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()
        if "layers." in name
    ]
    assert manifest.metrics["size"]["weight_bytes_over_dense"] == pytest.approx(sum(sizes) / sum(dense))
    with pytest.raises(ConfigError, match="deci checkpoint"):
        export_checkpoint(tmp_path / "deci", tmp_path / "copy", "dense")
    done, _ = plain(tmp_path / "deci", READ_DECI)
    assert done.returncode == 0 and done.stdout.strip() == "[(4, 96), (1, 32), (4, 50)]", done.stderr[-2000:]
    assert read_config(tmp_path / "logits.pt")["block_configs"][1]["ffn"]["intermediate_size"] == 32
    # Read as a model with widths per layer, the padded files compute the same.
    config = read_config(out)
    config["per_layer_config"] = {
        str(index): {"num_attention_heads": heads, "num_key_value_heads": groups, "intermediate_size": neurons}
        for index, (heads, groups, neurons) in enumerate(manifest.config["structural"]["padded_to"])
    }
    shutil.copytree(tmp_path / "deci", tmp_path / "read")
    (tmp_path / "read" / "config.json").write_text(json.dumps(config))
    same(logits(load(tmp_path / "read")), expected)
    with pytest.raises(UnsupportedModel, match="needs code from the checkpoint"):
        Decoder(tmp_path / "deci")


def test_the_decilm_layout_written_at_once_is_the_exported_one(tmp_path: Path) -> None:
    out, _ = assembled(tmp_path / "a", "llama", UNEVEN, "per-layer")
    export_checkpoint(out, tmp_path / "deci", "deci")
    direct, _ = assembled(tmp_path / "b", "llama", UNEVEN, "per-layer", layout="deci")
    assert read_config(direct) == read_config(tmp_path / "deci")
    first, second = load_file(direct / "model.safetensors"), load_file(tmp_path / "deci" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("family", "overrides", "part"),
    [
        ("qwen3", {}, "norms of queries"),
        ("mistral", {"sliding_window": 8}, "sliding"),
        ("gemma2", {}, "no norms behind attention and FFN and no soft caps, which gemma2 needs"),
        ("gemma3_text", {}, "no norms behind attention and FFN, which gemma3_text needs"),
        ("phi3", {}, "no fused matrices, which phi3 needs"),
    ],
)
def test_the_decilm_layout_refuses_what_it_cannot_hold(
    tmp_path: Path, family: str, overrides: dict[str, Any], part: str
) -> None:
    with pytest.raises(UnsupportedModel, match=part):
        assembled(tmp_path, family, UNEVEN, "per-layer", layout="deci", overrides=overrides)
    assert not (tmp_path / "out").exists()


def test_the_decilm_export_refuses_other_folders(tmp_path: Path) -> None:
    out, _ = assembled(tmp_path, "llama", EVEN, "uniform")
    with pytest.raises(ConfigError, match="no widths per layer"):
        export_checkpoint(out, tmp_path / "deci", "deci")
    config = prune_config("magnitude", "2:4")
    with pytest.raises(ConfigError, match="--format deci is for folders with widths per layer"):
        prune_and_export(resolve_model(str(out)), tmp_path / "both", config, None, formats=("dense", "deci"))
    uneven, _ = assembled(tmp_path / "b", "llama", ((4, 2, 96), (2, 2, 32), (1, 1, 64)), "per-layer")
    prune(resolve_model(str(uneven)), tmp_path / "pruned", config, None)
    with pytest.raises(ConfigError, match="zeros in a pattern"):
        export_checkpoint(tmp_path / "pruned", tmp_path / "deci", "deci")
