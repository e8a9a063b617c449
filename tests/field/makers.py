"""The library: small inputs of the kinds that people have, each with the answer that every command must give to it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.field import heads
from tests.field.library import WORKS, case
from tests.gguf_files import write_gguf
from tests.pico import make_pico_llama
from tests.pico_moe import make_moe

PLAIN = {
    **dict.fromkeys(("verify", "export_dense", "export_onnx", "export_deci"), "did not write this folder"),
    "export_packed": "none of its tensors is pruned",
}
GGUF = {**PLAIN, "verify": "is not a model folder"}  # of others, dequantised: pruned by nobody


@case(**PLAIN)
def plain(root: Path) -> Path:
    """What save_pretrained writes."""
    return make_pico_llama(root / "plain")


@case(**GGUF)
def gguf_in_parts(root: Path) -> Path:
    """A split GGUF, all of its parts, the second given."""
    first = write_gguf(root / "m.gguf", make_pico_llama(root / "pico"), parts=3)
    return first.with_name(first.name.replace("00001-of", "00002-of"))


@case(
    **dict.fromkeys(("inspect", "plan", "eval", "prune", "export", "serve", "bench"), "beside it"),
    verify="is not a model folder",
)
def gguf_part(root: Path) -> Path:
    """One part of a split GGUF, alone."""
    first = write_gguf(root / "m.gguf", make_pico_llama(root / "pico"), parts=3)
    for part in sorted(root.glob("*.gguf"))[1:]:
        part.unlink()
    return first


@case(
    **dict.fromkeys(("plan", "eval", "prune", "export", "serve", "bench"), "lacks weights"),
    verify="is not a model folder",
)
def gguf_without_a_tensor(root: Path) -> Path:
    """A whole GGUF that lacks one matrix."""
    pico = make_pico_llama(root / "pico")
    return write_gguf(root / "m.gguf", pico, rename=lambda name: None if name == "blk.0.ffn_up.weight" else name)


def _changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A folder whose weights went through `change`."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


EXPERTS = {
    **PLAIN,
    **dict.fromkeys(("prune_and_export", "search", "export_packed", "export_int8"), "crepe-deploy experts"),
    "tyr": "structural pruning knows",
    "export_gguf": "is not written as GGUF",
    "experts": WORKS,
}


@case(**EXPERTS)
def experts_one_by_one(root: Path) -> Path:
    """A mixture of experts as Qwen3 has it on the hub."""
    return make_moe(root / "m")


@case(**EXPERTS)
def experts_fused(root: Path) -> Path:
    """A mixture of experts whose files hold all of a layer in one tensor."""
    return make_moe(root / "m", "gpt_oss")


@case(**PLAIN)
def own_head(root: Path) -> Path:
    """config.json ties an output layer that is stored and differs."""
    return heads.own_head(root)


@case(**PLAIN)
def head_alone(root: Path) -> Path:
    """The output layer is stored and the embedding that it is tied to is not."""
    return heads.head_alone(root)


@case(**{name: word for name, word in PLAIN.items() if name != "export_packed"})
def sparse_elsewhere(root: Path) -> Path:
    """2:4 by another tool."""

    def halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name, weight in weights.items():
            if name.endswith("proj.weight"):
                weight.view(weight.shape[0], -1, 4)[..., 1:3] = 0
        return weights

    return _changed(make_pico_llama(root / "m"), halved)


def _configured(folder: Path, **entries: object) -> Path:
    """A folder with these entries in its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


@case(**PLAIN)
def quantization_of_null(root: Path) -> Path:
    """`"quantization_config": null`, as some trainers write it."""
    return _configured(make_pico_llama(root / "m"), quantization_config=None)


@case(**PLAIN)
def flash_attention(root: Path) -> Path:
    """A configuration that names attention kernels of the machine it was written on."""
    return _configured(make_pico_llama(root / "m"), _attn_implementation="flash_attention_2")


@case(**{**PLAIN, **dict.fromkeys(("eval", "tyr", "search", "export_gguf"), "has no tokenizer")})
def without_a_tokenizer(root: Path) -> Path:
    """Weights and a configuration alone."""
    folder = make_pico_llama(root / "m")
    for path in folder.glob("*token*"):
        path.unlink()
    return folder


@case(**PLAIN)
def stale_index(root: Path) -> Path:
    """Saved twice: an index of shards that are gone lies beside the single file."""
    folder = make_pico_llama(root / "m")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00002.safetensors"}}')
    return folder


@case(**PLAIN)
def hub_snapshot(root: Path) -> Path:
    """As the hub's cache lays it out, with what its download adds."""
    snapshot, blobs = root / "models--a--b" / "snapshots" / "abc", root / "models--a--b" / "blobs"
    make_pico_llama(snapshot)
    (snapshot / ".gitattributes").write_text("")
    blobs.mkdir()
    for path in sorted(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(os.path.relpath(blobs / path.name, path.parent))
    return snapshot


@case(
    **{
        **dict.fromkeys(("plan", "eval", "prune", "export_int8", "export_packed", "export_gguf"), "is missing"),
        **{name: word for name, word in PLAIN.items() if name != "export_packed"},
        "eval": "lacks weights",
    }
)
def without_a_norm(root: Path) -> Path:
    """A tensor is not there."""
    folder = make_pico_llama(root / "m")
    return _changed(folder, lambda weights: {name: weights[name] for name in weights if name != "model.norm.weight"})


@case(
    **{
        **dict.fromkeys(("plan", "prune", "export_int8", "export_packed", "export_gguf"), "holds uint32"),
        **{name: word for name, word in PLAIN.items() if name != "export_packed"},
        "eval": "holds uint32",
    }
)
def whole_numbers(root: Path) -> Path:
    """A matrix of uint32, as packed quantisations have, and nothing that says so."""
    name = "model.layers.0.mlp.up_proj.weight"
    return _changed(
        make_pico_llama(root / "m"), lambda weights: {**weights, name: (weights[name] * 100).to(torch.uint32)}
    )


@case(
    every="hold no tensors",
    verify="manifest.json",
    export_dense="manifest.json",
    export_onnx="manifest.json",
    export_deci="manifest.json",
)
def no_tensors(root: Path) -> Path:
    """A weight file that holds nothing."""
    return _changed(make_pico_llama(root / "m"), lambda _: {})
