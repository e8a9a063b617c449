"""The architecture that a config.json describes: its configuration, and its modules without weights.

A configuration is anybody's, so nothing is built from it that the files do not bear out: first an `outline`, which
allocates nothing, to be compared with the headers; then the modules that compute.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from crepe_deploy.errors import CheckpointError, UnsupportedModel
from crepe_deploy.store.checkpoint import CheckpointReader, TensorInfo, read_config
from crepe_deploy.store.stock import CLOSED, blamed, config_of, configured, model_content, third_party

TABLE_BYTES: Final = 1 << 30  # of buffers, which are computed and in no file: positions, causal masks
SPARE_PARAMETERS: Final = 1000
PACKED_IN_BYTE: Final = 16  # weights, more than any quantisation packs
_SIZES: Final = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
_COUNTS: Final = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def load_config(root: Path) -> Any:
    """The transformers configuration of an unquantised decoder's folder. Raises CheckpointError, UnsupportedModel."""
    content = model_content(root)
    name = content.get("model_type", "unknown")
    if quantised := content.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise UnsupportedModel(f"{root} is already quantised or packed ({method}); give the unquantised model")
    config = config_of(root)
    if getattr(config, "is_encoder_decoder", False) or hasattr(config, "vision_config"):
        raise UnsupportedModel(f"model type '{name}' is not a text-only decoder")
    _check_counts(root, config)
    return config


def content_with_sizes(root: Path, config: Any) -> dict[str, Any]:
    """`config.json`, and the sizes that it leaves to its family's defaults; config: what `load_config` made of it."""
    return {**{name: size for name, size in config.to_dict().items() if name in _SIZES}, **read_config(root)}


def _check_counts(root: Path, config: Any) -> None:
    text = config.get_text_config()
    for name in _COUNTS:
        spelled = text.attribute_map.get(name, name)
        value = vars(text).get(spelled)
        if value is not None and not isinstance(value, list) and (not isinstance(value, int) or value < 1):
            raise UnsupportedModel(f"{root / 'config.json'}: '{spelled}' is {value!r}; whole and at least 1 is needed")


def outline(root: Path, config: Any, tensors: int) -> Any:
    """The causal language model of a configuration with everything on the meta device: it costs no memory.

    tensors: in the files of `root`; a model with far more parameters is refused before it is whole. Raises
    UnsupportedModel, which names the entry of config.json at fault where leaving it out helps.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    place = root / "config.json"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModel(f"{place}: model type '{config.model_type}' has no causal language model")

    def attempt(of: Any) -> Any:
        with torch.device("meta"), _each_parameter(_limit(2 * tensors + SPARE_PARAMETERS)):
            return from_config(copy.deepcopy(of), torch.float32)  # which writes the dtype into it

    try:
        with third_party(place, UnsupportedModel):
            model = attempt(config)
    except UnsupportedModel as error:
        fault = blamed(model_content(root), lambda rest: attempt(configured(rest, root)))
        raise UnsupportedModel(f"{error}{fault}") from error
    name, largest = max(model.named_buffers(), key=lambda named: named[1].nbytes, default=("", torch.empty(0)))
    if sum(buffer.nbytes for buffer in model.buffers()) > TABLE_BYTES:
        raise UnsupportedModel(f"{place}: it asks for tables like '{name}' of shape {tuple(largest.shape)}")
    return model


def whole_model(folder: Path, **options: Any) -> Any:
    """A causal language model by stock transformers, in eval mode: safetensors only, no weight missing.

    options: of `from_pretrained`. Raises CheckpointError, UnsupportedModel.
    """
    from transformers import AutoModelForCausalLM

    if (folder / "adapter_config.json").exists():  # with peft installed transformers would load another model
        raise UnsupportedModel(f"{folder} holds a LoRA adapter beside its weights: merge it first")
    reader, config = CheckpointReader(folder), config_of(folder)
    _check_counts(folder, config)
    asked = sum(parameter.numel() for parameter in outline(folder, config, len(reader.tensors)).parameters())
    quantised = getattr(config, "quantization_config", None)
    stored = next((info for info in reader if _unlike_weights(info)), None)
    if stored is not None and not quantised:
        kind = str(stored.dtype).removeprefix("torch.")
        raise UnsupportedModel(f"{stored.file}: tensor '{stored.name}' holds {kind} and config.json does not say how")
    held = sum(PACKED_IN_BYTE * info.size_bytes if quantised else math.prod(info.shape) for info in reader)
    if asked > 2 * held:  # what merely lacks weights is named by them below
        raise CheckpointError(f"{folder}: config.json asks for {asked} weights and the files hold {held}")
    with third_party(f"transformers cannot load {folder}", CheckpointError):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder), config=config, use_safetensors=True, output_loading_info=True, **CLOSED, **options
        )
    if info["missing_keys"]:
        raise CheckpointError(f"{folder} lacks weights that the model needs: {', '.join(sorted(info['missing_keys']))}")
    return model.eval()


def _unlike_weights(info: TensorInfo) -> bool:
    """Whether a tensor is of a dtype that transformers would make numbers of in silence: float8, whole, complex."""
    plain = info.dtype.is_floating_point and info.dtype.itemsize > 1
    return not plain and (info.dtype.is_floating_point or (info.name.endswith(".weight") and len(info.shape) > 1))


def build_meta(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of a configuration, in eval mode, its parameters on the meta device.

    Buffers are real: rotary frequencies and embedding scales are computed at construction and are in no file.
    Raises UnsupportedModel where transformers has none.
    """
    place = f"model type '{config.model_type}' has no causal language model"
    with third_party(place, UnsupportedModel), _each_parameter(_to_meta):
        return from_config(config, dtype).eval()


def from_config(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of a configuration, its weights as the family draws them."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=CLOSED["trust_remote_code"])


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def _limit(most: int) -> Callable[[nn.Module, str, nn.Parameter], None]:
    """Counts parameters, and raises ValueError beyond `most`."""
    seen = 0

    def count(_module: nn.Module, _name: str, _parameter: nn.Parameter) -> None:
        nonlocal seen
        seen += 1
        if seen > most:
            raise ValueError("it asks for far more tensors than the files hold")

    return count


@contextlib.contextmanager
def _each_parameter(act: Callable[[nn.Module, str, nn.Parameter], None]) -> Iterator[None]:
    """Inside, `act` is called with every parameter that a module registers: module, name, parameter."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            act(module, name, parameter)

    nn.Module.register_parameter = registered  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
