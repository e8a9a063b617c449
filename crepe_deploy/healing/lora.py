"""LoRA on weights whose zeros stay: the adapter is masked as it is added, so that what is trained is what is served."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from crepe_deploy.errors import UnsupportedModel
from crepe_deploy.extras import require

ADAPTER = "default"


def check_lora() -> None:
    """Raise MissingExtra where there is no peft."""
    require("healing with --lora", "peft")


def adapt(model: Any, names: Iterable[str], rank: int, seed: int) -> None:
    """Put an adapter of this rank on the layers with these weights, in float32, by peft; only adapters have gradients.

    Raises UnsupportedModel for layers that are no nn.Linear.
    """
    from peft import LoraConfig, inject_adapter_in_model

    paths = [name.removesuffix(".weight") for name in names]
    for path in paths:
        if not isinstance(model.get_submodule(path), nn.Linear):
            raise UnsupportedModel(f"--lora is for nn.Linear layers, and '{path}' is none: heal without it")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=paths)
    config._register_custom_module({nn.Linear: _masked_layer()})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == len(paths)


def merged(module: Any) -> Tensor | None:
    """The weight of a layer with its adapter merged, its zeros zeros; None for a layer without one."""
    if not hasattr(module, "lora_A"):
        return None
    weight: Tensor = module.merged_weight().detach()
    return weight


def _masked_layer() -> type[nn.Module]:
    from peft.tuners.lora import Linear

    class MaskedLinear(Linear):  # type: ignore[misc]
        """peft's layer, its weight merged at every call with what the adapter adds outside the zeros."""

        def merged_weight(self) -> Tensor:
            """In the dtype of the weight: what this layer computes with, and what is written."""
            weight: Tensor = self.base_layer.weight
            added: Tensor = self.get_delta_weight(ADAPTER)
            return (weight + added.masked_fill(weight == 0, 0)).to(weight.dtype)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """As a linear layer of the merged weight."""
            return linear(x, self.merged_weight(), self.base_layer.bias)

    return MaskedLinear
