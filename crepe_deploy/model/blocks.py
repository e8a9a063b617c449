"""Where a model's decoder blocks are, and which of their modules are linear layers."""

from __future__ import annotations

from torch import nn

from crepe_deploy.errors import UnsupportedModel

from .experts import Experts
from .families import covered, family_of, known


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and for the Conv1D of GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def holds_experts(module: nn.Module) -> bool:
    """Whether a module is all experts of a block, fused: one matrix behind the other in each parameter."""
    return any(name == "down_proj" and value.ndim == 3 for name, value in module.named_parameters(recurse=False))


def expert_layer(block: nn.Module, experts: Experts) -> tuple[nn.Module, nn.Module] | None:
    """The router and the experts of a block; None for a dense one of the same family."""
    parts = dict(block.named_modules())
    found = parts.get(experts.module)
    return None if found is None or not holds_experts(found) else (parts[experts.router], found)


def find_blocks(model: nn.Module, *, experts: bool = False) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its path: the only outermost list of modules that hold linear layers.

    experts: as of `Decoder`. Raises UnsupportedModel where there is none, or another one beside it; where its modules
    are of several kinds; where a block holds matrices that are no linear layers.
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
    family = family_of(str(getattr(getattr(model, "config", None), "model_type", ""))).experts
    for index, block in enumerate(blocks):
        _check_block(name, f"{path}.{index}", block, family, experts=experts)
    if len(lists) > 1:
        raise UnsupportedModel(
            f"{name}: linear layers are in several lists, {', '.join(lists)}; one list of decoder blocks is handled"
        )
    return path, blocks


def _check_block(name: str, path: str, block: nn.Module, family: Experts | None, *, experts: bool) -> None:
    layer = expert_layer(block, family) if family is not None else None
    for parameter_name, parameter in block.named_parameters():
        owner = block.get_submodule(parameter_name.rpartition(".")[0])
        if layer is not None and owner in layer and experts:
            continue
        if parameter.ndim >= 2 and not is_linear(owner):
            raise UnsupportedModel(
                f"{name}: '{path}.{parameter_name}' of shape {tuple(parameter.shape)} belongs to "
                f"{type(owner).__name__}, which is not a linear layer (experts and convolutions are not supported); "
                + (
                    "`crepe-deploy experts` removes whole experts of this family, `crepe-deploy prune` prunes inside "
                    "them, and the dense folders of both load wherever the model does"
                    if layer is not None and owner in layer
                    else f"tested families: {', '.join(covered())}; with experts: {known('experts')}"
                )
            )
