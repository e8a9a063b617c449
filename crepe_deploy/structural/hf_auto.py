"""transformers: model types `crepe_FAMILY`, with which `from_pretrained` loads models with widths per layer.

Importing this module registers them; `import crepe_deploy` arranges for that as soon as transformers' own are
registered. What is registered is a stand-in: transformers imports itself in circles, and the families' classes, which
ours extend, can be imported only once that is over. The first use of a stand-in puts the real classes in place.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .layout import PER_LAYER_CLASSES


class ConfigToBe:
    """Stands where a configuration class will be."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type

    def __getattr__(self, name: str) -> Any:
        return getattr(load()[self.model_type], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return load()[self.model_type](*args, **kwargs)


def load() -> dict[str, Any]:
    """Import the configurations and the models and register both; the configurations by model type."""
    from transformers import AutoModel, AutoModelForCausalLM

    from . import configuration_crepe, modeling_crepe

    configs = {}
    for model_type, causal in PER_LAYER_CLASSES.items():
        stem = causal.removesuffix("ForCausalLM")
        config = configs[model_type] = getattr(configuration_crepe, f"{stem}Config")
        CONFIG_MAPPING.register(model_type, config, exist_ok=True)
        AutoModel.register(config, getattr(modeling_crepe, f"{stem}Model"), exist_ok=True)
        AutoModelForCausalLM.register(config, getattr(modeling_crepe, causal), exist_ok=True)
    return configs


for _model_type in PER_LAYER_CLASSES:
    CONFIG_MAPPING.register(_model_type, ConfigToBe(_model_type), exist_ok=True)
