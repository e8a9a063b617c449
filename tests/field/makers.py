"""The library: small inputs of the kinds that people have, each with the answer that every command must give to it."""

from __future__ import annotations

from pathlib import Path

from tests.field.library import case
from tests.gguf_files import write_gguf
from tests.pico import make_pico_llama

PLAIN = {
    "verify": "manifest.json", "export_dense": "manifest.json", "export_packed": "manifest.json",
    "export_onnx": "manifest.json", "export_deci": "manifest.json",
}  # fmt: skip
NO_FOLDER = dict.fromkeys(("inspect", "verify", "export"), "is not a model folder")


@case(**PLAIN)
def plain(root: Path) -> Path:
    """What save_pretrained writes."""
    return make_pico_llama(root / "plain")


@case(**NO_FOLDER)
def gguf_in_parts(root: Path) -> Path:
    """A split GGUF, all of its parts, the second given."""
    first = write_gguf(root / "m.gguf", make_pico_llama(root / "pico"), parts=3)
    return first.with_name(first.name.replace("00001-of", "00002-of"))


@case(**{**NO_FOLDER, "plan": "beside it", "eval": "beside it", "prune": "beside it"})
def gguf_part(root: Path) -> Path:
    """One part of a split GGUF, alone."""
    first = write_gguf(root / "m.gguf", make_pico_llama(root / "pico"), parts=3)
    for part in sorted(root.glob("*.gguf"))[1:]:
        part.unlink()
    return first


@case(**{**NO_FOLDER, "plan": "lacks weights", "eval": "lacks weights", "prune": "lacks weights"})
def gguf_without_a_tensor(root: Path) -> Path:
    """A whole GGUF that lacks one matrix."""
    pico = make_pico_llama(root / "pico")
    return write_gguf(root / "m.gguf", pico, rename=lambda name: None if name == "blk.0.ffn_up.weight" else name)
