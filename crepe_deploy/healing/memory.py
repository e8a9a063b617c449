"""The memory that healing will take, from a folder's headers and a run of its model on tensors that are not there."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from crepe_deploy.errors import UnsupportedModel
from crepe_deploy.model.architecture import from_config, load_config
from crepe_deploy.model.decoder import COMPUTE_DTYPES, Decoder
from crepe_deploy.store.manifest import MANIFEST_NAME, Manifest, load_manifest
from crepe_deploy.store.stock import third_party

from .config import HealConfig
from .student import Trained, choose, compute_dtype

_MASTER, _MOMENTS, _MASK = 4, 8, 1  # bytes of each trained weight, besides the model's own


def peak_bytes(folder: Path, config: HealConfig) -> int:
    """Peak above the libraries of healing `folder`, or of healing what is pruned from it. Raises UnsupportedModel.

    Both models, the trained weights' masters, moments, gradients and masks, what a forward pass keeps for the backward
    one, and three sets of logits.
    """
    decoder = Decoder(folder)
    manifest = load_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
    trained = choose(decoder, manifest, config.train)
    dtype = COMPUTE_DTYPES[compute_dtype(decoder, config)]
    own = _numbers(decoder, [info.name for info in decoder.reader]) * dtype.itemsize
    updated = _updated(decoder, trained, config)
    tokens = config.batch_tokens // config.accumulate
    logits = 3 * tokens * decoder.vocab_size * dtype.itemsize
    pruned = _numbers(decoder, list(trained.kept.values()))
    kept = saved_bytes(folder, trained, config, dtype)
    if config.lora is not None:
        kept += pruned * (dtype.itemsize + _MASK)  # the merged weight of every layer
    if config.checkpointing:
        blocks = len(decoder.blocks)
        kept = kept // blocks + blocks * tokens * int(decoder.config.hidden_size) * dtype.itemsize
    masks = 0 if config.lora is not None else _MASK * pruned
    models = round(own * (1 + _dense_over(manifest)))
    return models + updated * (_MASTER + _MOMENTS + dtype.itemsize) + masks + logits + kept


def saved_bytes(folder: Path, trained: Trained, config: HealConfig, dtype: torch.dtype) -> int:
    """What one forward pass of training keeps, counted as it runs without memory."""
    place = f"the memory that training {folder} takes cannot be told"
    seen: dict[int, tuple[int, Any]] = {}
    with third_party(place, UnsupportedModel), FakeTensorMode(allow_non_fake_inputs=True):
        model = from_config(load_config(folder), dtype).requires_grad_(False).train()
        for name in (*trained.norms, *trained.kept):
            model.get_parameter(name).requires_grad_(True)
        own = {one.untyped_storage()._cdata for one in (*model.parameters(), *model.buffers())}
        tokens = torch.zeros(config.windows // config.accumulate, config.window, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(_counting(seen, own), lambda tensor: tensor):
            model(input_ids=tokens, use_cache=False)
    return sum(size for size, _ in seen.values())


def _counting(seen: dict[int, tuple[int, Any]], own: set[int]) -> Callable[[Tensor], Tensor]:
    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = (storage.nbytes(), storage)  # held, so that no other gets its address
        return tensor

    return count


def _numbers(decoder: Decoder, keys: list[str]) -> int:
    return sum(math.prod(decoder.reader.info(key).shape) for key in keys)


def _updated(decoder: Decoder, trained: Trained, config: HealConfig) -> int:
    """Numbers that the optimiser keeps."""
    norms = _numbers(decoder, list(trained.norms.values()))
    if config.lora is None:
        return norms + _numbers(decoder, list(trained.kept.values()))
    return norms + sum(config.lora * sum(decoder.reader.info(key).shape) for key in trained.kept.values())


def _dense_over(manifest: Manifest | None) -> float:
    """The dense model's bytes over this one's."""
    size = manifest.metrics.get("size", {}) if manifest is not None else {}
    return 1 / float(size.get("file_bytes_over_dense", 1.0))
