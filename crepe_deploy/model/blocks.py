"""Where a model's decoder blocks are, and which of their modules are linear layers."""

from __future__ import annotations

from torch import nn

from crepe_deploy.errors import UnsupportedModel

from .families import covered


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and for the Conv1D of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its path: the outermost list of like modules that hold linear layers.

    Raises UnsupportedModel where there is none, or where a block holds matrices that are no linear layers.
    """
    name = type(model).__name__
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len({type(block) for block in module}) != 1:
            continue
        if any(is_linear(part) for part in module[0].modules()):
            for index, block in enumerate(module):
                _check_block(name, f"{path}.{index}", block)
            return path, module
    raise UnsupportedModel(f"{name}: no list of decoder blocks with linear layers was found")


def _check_block(name: str, path: str, block: nn.Module) -> None:
    for parameter_name, parameter in block.named_parameters():
        owner = block.get_submodule(parameter_name.rpartition(".")[0])
        if parameter.ndim >= 2 and not is_linear(owner):
            raise UnsupportedModel(
                f"{name}: '{path}.{parameter_name}' of shape {tuple(parameter.shape)} belongs to "
                f"{type(owner).__name__}, which is not a linear layer (experts and convolutions are not supported); "
                f"tested families: {', '.join(covered())}"
            )
