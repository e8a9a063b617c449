"""The configuration of a DeciLM (`nemotron-nas`) checkpoint, which lies beside its weights as remote code.

vLLM has the model and not its configuration class. vLLM reads `config.block_configs[i].attention.n_heads_in_group`, by
attribute, and asks for optional fields with `hasattr`.
"""

from __future__ import annotations

from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig


class Block(dict[str, Any]):
    """A JSON object whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Block(value) if isinstance(value, dict) else value


class DeciLMConfig(LlamaConfig):  # type: ignore[misc]
    """Llama's configuration with one entry of `block_configs` for each layer."""

    model_type = "nemotron-nas"

    def __post_init__(self, block_configs: Any = None, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.block_configs = [Block(block) for block in block_configs or ()]

    def validate_architecture(self) -> None:
        """Head sizes are stated: the head count need not divide the hidden size."""

    def validate(self) -> None:
        """As above."""
