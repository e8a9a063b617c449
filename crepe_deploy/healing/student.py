"""The pruned model as it is trained: which of its parameters, and what each becomes in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from crepe_deploy.errors import UnsupportedModel
from crepe_deploy.model.architecture import whole_model
from crepe_deploy.model.blocks import is_linear
from crepe_deploy.model.decoder import COMPUTE_DTYPES, Decoder
from crepe_deploy.store.manifest import Manifest

from .config import HealConfig
from .lora import adapt, merged


@dataclass(frozen=True)
class Trained:
    """Checkpoint names by parameter name. kept: weights of pruned layers; of narrowed ones, of all in the blocks."""

    norms: Mapping[str, str]
    kept: Mapping[str, str]

    @property
    def keys(self) -> list[str]:
        """Checkpoint names of everything that is trained."""
        return [*self.norms.values(), *self.kept.values()]


def choose(decoder: Decoder, manifest: Manifest | None, train: tuple[str, ...]) -> Trained:
    """What of the model in a folder is trained; of one without a manifest, as if all were pruned.

    Raises UnsupportedModel where that is nothing.
    """
    pruned = manifest.tensors if manifest is not None else {}
    kept = {
        f"{decoder.blocks_path}.{index}.{spec.path}.weight": spec.key
        for index, specs in enumerate(decoder.linears)
        for spec in specs
        if spec.key in pruned or not pruned
    }
    norms = {
        f"{path}.{name}": decoder.key(f"{path}.{name}")
        for path, module in _outline(decoder).items()
        if not is_linear(module) and not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 1
    }
    trained = Trained(norms if "norms" in train else {}, kept if "kept" in train else {})
    if not trained.keys:
        raise UnsupportedModel(f"{decoder.reader.root} has nothing of what --train names")
    return trained


def _outline(decoder: Decoder) -> dict[str, nn.Module]:
    """Every module of the whole model by path, its real blocks in place of the decoder's slots."""
    inside = f"{decoder.blocks_path}."
    modules = {path: module for path, module in decoder.model.named_modules() if not path.startswith(inside)}
    for index, block in enumerate(decoder.blocks):
        modules |= {f"{inside}{index}.{path}".rstrip("."): module for path, module in block.named_modules()}
    return modules


class Student:
    """A loaded model, of which only what is trained has gradients."""

    def __init__(self, decoder: Decoder, trained: Trained, config: HealConfig, device: Any) -> None:
        self.trained = trained
        self.dtype = compute_dtype(decoder, config)
        self.model = whole_model(decoder.reader.root, dtype=COMPUTE_DTYPES[self.dtype]).to(device)
        self.model.requires_grad_(False)
        _without_dropout(self.model)
        if config.lora is not None:
            adapt(self.model, trained.kept, config.lora, config.seed)
        for name in [*trained.norms, *(trained.kept if config.lora is None else ())]:
            self.model.get_parameter(name).requires_grad_(True)
        if config.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()  # without dropout it computes as it will be served; checkpointing asks for it

    def parameters(self) -> dict[str, nn.Parameter]:
        """What has gradients, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """What is trained as it would be written, by checkpoint name, one at a time."""
        for name, key in (*self.trained.norms.items(), *self.trained.kept.items()):
            path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(path)
            tensor = merged(module) if leaf == "weight" else None
            yield key, module.get_parameter(leaf).detach() if tensor is None else tensor


def compute_dtype(decoder: Decoder, config: HealConfig) -> str:
    """The dtype that both models are computed in."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if decoder.dtype == COMPUTE_DTYPES["float32"] else "bfloat16"


def _without_dropout(model: nn.Module) -> None:
    """Training is computed as serving is: no noise, and the same bytes again."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
