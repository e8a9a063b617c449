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
    """The list of decoder blocks and its path: the only outermost list of modules that hold linear layers.

    Raises UnsupportedModel where there is none, or another one beside it; where its modules are of several kinds; where
    a block holds matrices that are no linear layers.
    """
    name = type(model).__name__
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inner = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inner and any(is_linear(part) for part in module.modules()):
            lists[path] = module
    if not lists:
        raise UnsupportedModel(f"{name}: no list of decoder blocks with linear layers was found")
    path, blocks = next(iter(lists.items()))
    kinds = sorted({type(block).__name__ for block in blocks})
    if len(kinds) != 1:
        raise UnsupportedModel(f"{name}: the blocks of '{path}' are of several kinds: {', '.join(kinds)}")
    for index, block in enumerate(blocks):
        _check_block(name, f"{path}.{index}", block)
    if len(lists) > 1:
        raise UnsupportedModel(
            f"{name}: linear layers are in several lists, {', '.join(lists)}; one list of decoder blocks is handled"
        )
    return path, blocks


def _check_block(name: str, path: str, block: nn.Module) -> None:
    for parameter_name, parameter in block.named_parameters():
        owner = block.get_submodule(parameter_name.rpartition(".")[0])
        if parameter.ndim >= 2 and not is_linear(owner):
            raise UnsupportedModel(
                f"{name}: '{path}.{parameter_name}' of shape {tuple(parameter.shape)} belongs to "
                f"{type(owner).__name__}, which is not a linear layer (experts and convolutions are not supported); "
                f"tested families: {', '.join(covered())}"
            )
