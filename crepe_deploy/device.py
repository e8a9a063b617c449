"""Where tensors live: the one place that knows which devices there are, and what waits on which.

A command computes on one device, which `--device` names. Its `Decoder` is told; it puts a block's weights there when
the walk comes to it, and everything made of them follows, for functions make tensors where their arguments are. The
host keeps what is read and written, token ids, random numbers before they are used, and hidden states between two
blocks unless the device has room for them (`resting_place`). On the CPU all of these are one memory and nothing moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .progress import Say

CPU = torch.device("cpu")
AUTO = "auto"
TOKEN_SETS = 16  # that hidden states are held of at once, at most: settings or candidates that go side by side


def devices() -> list[str]:
    """The names of the devices that torch can compute on here, those of `auto` last."""
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def resolve(name: str) -> torch.device:
    """The device of `auto`, the first GPU that there is or else the CPU, or of a name; "cuda" is the first GPU.

    Raises ConfigError, which says what there is.
    """
    there = devices()
    if name == AUTO:
        return torch.device(there[min(1, len(there) - 1)])
    found = next((one for one in there if name in (one, one.removesuffix(":0"))), None)
    if found is None:
        gpus = ", ".join(there[1:]) or "torch sees no GPU"
        raise ConfigError(f"--device {name}: there is no such device here; there is: cpu, {gpus}")
    return torch.device(found)


def chosen(name: str, say: Say) -> torch.device:
    """As `resolve`; what `auto` came to is said in one line, which a `Later` keeps until work begins."""
    device = resolve(name)
    if name == AUTO:
        say(f"computing on {described(device)}")
    return device


def described(device: torch.device) -> str:
    """A device for a reader: cpu, or a GPU with its name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def device_of(module: nn.Module) -> torch.device:
    """Where a module that is in memory computes: where its weights are."""
    return next(module.parameters()).device


def resting_place(device: torch.device, size: int) -> torch.device:
    """Where a token set's hidden states, of `size` bytes, wait between blocks: on the device if many of them fit."""
    return device if device.type == CPU.type or TOKEN_SETS * size <= free_bytes(device) else CPU


def free_bytes(device: torch.device) -> int:
    """Memory that a GPU has left; 0 where torch does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def moved(value: Any, device: torch.device) -> Any:
    """The same, its tensors on the device; those in tuples, lists and dictionaries too."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(part, device) for part in value)
    if type(value) is dict:
        return {key: moved(part, device) for key, part in value.items()}
    return value
