"""The zeros of a model, held while anything trains it: gradients masked, weights masked again after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from crepe_deploy.errors import ConfigError, VerifyError


class HeldZeros:
    """Zeros that stay until `release`, which proves them; a `with` block releases at its end.

    masks: by parameter name, true where the weight is zero; under FSDP of this process's share of it.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self.masks = {name: local(parameter.data) == 0 for name, parameter in parameters.items()}
        self._hooks = [register_optimizer_step_post_hook(lambda *_: self.apply())]
        for name, parameter in parameters.items():
            if parameter.requires_grad and not isinstance(parameter, DTensor):  # a DTensor's gradient passes no hook
                self._hooks.append(parameter.register_hook(_masked(self.masks[name])))  # type: ignore[no-untyped-call]

    def apply(self) -> None:
        """Put the zeros back where they were."""
        for name, parameter in self._parameters.items():
            local(parameter.data).masked_fill_(self.masks[name], 0)

    def prove(self) -> dict[str, int]:
        """Count the zeros that were to be held, by parameter name. Raises VerifyError naming one that lost some."""
        counted = {}
        for name, parameter in self._parameters.items():
            lost = int((local(parameter.data)[self.masks[name]] != 0).sum())
            if lost:
                raise VerifyError(f"'{name}' has lost {lost} of its zeros in training")
            counted[name] = int(self.masks[name].sum())
        return counted

    def release(self) -> dict[str, int]:
        """Hold no longer; what `prove` then counts. Raises VerifyError."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        return self.prove()

    def __enter__(self) -> HeldZeros:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if kind is None:
            self.prove()


def hold_zeros(model: nn.Module, names: Iterable[str] | None = None) -> HeldZeros:
    """Hold every exact zero of a pruned model's weights from now on, whatever optimiser of torch trains it.

    names: of the parameters to hold; None: all of two dimensions or more outside embeddings that have zeros, those of
    nothing but zeros left out, as a fresh adapter is. Call it once the weights are where they are trained: behind
    `.to(device)`, DDP or `fully_shard`. Raises ConfigError where no weight has zeros, or there is no such parameter.
    """
    parameters = dict(model.named_parameters())
    if names is not None:
        chosen = list(names)
        if unknown := [name for name in chosen if name not in parameters]:
            raise ConfigError(f"the model has no parameter '{unknown[0]}' whose zeros could be held")
        return HeldZeros({name: parameters[name] for name in chosen})
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.ndim >= 2 and id(parameter) not in embedded and _partly_zero(local(parameter.data))
    }
    if not found:
        raise ConfigError("no weight of the model has zeros to hold: is it the pruned one, and unpacked?")
    return HeldZeros(found)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that several hold together; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _partly_zero(weight: Tensor) -> bool:
    return weight.is_floating_point() and 0 < int(weight.count_nonzero()) < weight.numel()


def _masked(mask: Tensor) -> Callable[[Tensor], Any]:
    return lambda gradient: gradient.masked_fill(mask, 0)
