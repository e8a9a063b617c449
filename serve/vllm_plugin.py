"""The vLLM plugin: with crepe-deploy installed, `vllm serve DIR` serves packed checkpoints and widths per layer.

vLLM calls `register` in every one of its processes. Importing this module imports neither torch nor vLLM.
"""

from __future__ import annotations

import logging

_LOG = logging.getLogger("crepe_deploy")


def register() -> None:
    """Make our quantization method and architectures known to this vLLM process; may be called more than once."""
    request_amx()
    try:
        from . import vllm_packed  # noqa: F401  (importing it registers it)
    except ImportError as error:
        _LOG.warning("this vLLM is not one that crepe-deploy knows; it cannot serve packed checkpoints: %s", error)
    try:
        register_models()
    except ImportError as error:
        _LOG.warning("this vLLM is not one that crepe-deploy knows; it cannot serve widths per layer: %s", error)


def register_models() -> None:
    """Name the architectures of models with widths per layer; vLLM imports them when it meets one.

    Their configurations are registered with transformers by importing crepe_deploy, which has happened here.
    """
    from vllm import ModelRegistry

    from ..structural.layout import PER_LAYER_CLASSES

    for name in PER_LAYER_CLASSES.values():
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"crepe_deploy.serve.vllm_structural:{name}")


def request_amx() -> None:
    """Ask the kernel for AMX tiles, once for each process.

    vLLM's own attention kernel uses them without asking and then dies of SIGILL where nobody else asked.
    """
    import torch

    initialise = getattr(torch.cpu, "_init_amx", None)  # absent where torch was built without it
    if initialise is not None:
        initialise()
