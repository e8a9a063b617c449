"""Builds what configs/bench-llama-1b.yaml measures, below out/bench/llama-1b.

    python -m crepe_deploy.bench.studies.llama_1b

A random bf16 checkpoint of Llama-3.2-1B's shape, pruned by magnitude, and its packed exports: speed does not depend on
values. Its head is dense in every candidate, so a decode step at batch 1 cannot gain more than the bytes that a dense
step reads over those of a packed one (`step_bytes` in the run's notes).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from ...progress import progress
from .frame import folder_option

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


def make_llama_1b(folder: Path) -> None:
    """Write a random bf16 checkpoint of Llama-3.2-1B's shape, tensor by tensor, unless it is there."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ...store.writing import CheckpointWriter, Planned

    if (folder / "model.safetensors").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**LLAMA_1B, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    plan = {name: Planned("model.safetensors", torch.bfloat16, shape) for name, shape in shapes.items()}
    with CheckpointWriter(folder, plan) as writer:
        for name, shape in shapes.items():
            weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            writer.write(name, weight if len(shape) > 1 else torch.ones(shape, dtype=torch.bfloat16))


def build(root: Path, patterns: Sequence[str]) -> list[Path]:
    """The dense folder with the first pattern's zeros, then the packed ones; what is there already is kept."""
    from ...exporting.pipeline import export_checkpoint
    from ...pruning.config import prune_config
    from ...pruning.prune import prune
    from ...store.sources import resolve_model

    model = root / "model"
    folders: list[Path] = []
    for pattern in patterns:
        slug = pattern.replace(":", "of")
        pruned, packed = root / f"dense-{slug}", root / f"packed-{slug}"
        if not packed.is_dir() or not folders:
            make_llama_1b(model)
            if not pruned.is_dir():
                with progress(f"pruning to {pattern}") as step:
                    prune(
                        resolve_model(str(model)), pruned, prune_config("magnitude", pattern), None,
                        step=step,
                    )  # fmt: skip
            if not packed.is_dir():
                export_checkpoint(pruned, packed, "packed")
        folders += [pruned, packed] if not folders else [packed]
    return folders


@click.command()
@folder_option("out/bench/llama-1b")
@click.option("--patterns", default="2:4,16:32", show_default=True)
def main(folder: Path, patterns: str) -> None:
    """Build the folders and print them."""
    for built in build(folder, patterns.split(",")):
        click.echo(built)


if __name__ == "__main__":
    main()
