"""The vLLM plugin: with crepe-deploy installed, `vllm serve DIR` serves packed checkpoints; no flag is needed.

vLLM calls `register` in every one of its processes. Importing this module imports neither torch nor vLLM.
"""

from __future__ import annotations

import logging

_LOG = logging.getLogger("crepe_deploy")


def register() -> None:
    """Make the quantization method `crepe_nm` known to this vLLM process; may be called more than once."""
    request_amx()
    try:
        from . import vllm_quant  # noqa: F401  (importing it registers it)
    except ImportError as error:
        _LOG.warning("this vLLM is not one that crepe-deploy knows; it cannot serve packed checkpoints: %s", error)


def request_amx() -> None:
    """Ask the kernel for AMX tiles, once for each process.

    vLLM's own attention kernel uses them without asking and then dies of SIGILL where nobody else asked.
    """
    import torch

    initialise = getattr(torch.cpu, "_init_amx", None)  # absent where torch was built without it
    if initialise is not None:
        initialise()
