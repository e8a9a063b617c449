"""One pass of the dense model over the calibration tokens: input norms, sketches, and sampled rows of every layer.

The sketch of an input X (tokens, in) is Y = P X with P (r, tokens) of random signs / sqrt(r): E[Y^T Y] = X^T X, and the
error ||E X^T||_F^2 of any change E of the weights is estimated by ||E Y^T||_F^2 with a relative standard error of at
most sqrt(2/r) in each layer, whatever E.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crepe_deploy.device import CPU
from crepe_deploy.errors import OutputError
from crepe_deploy.model.calibrate import Stream, embed
from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.model.stats import Stats, Variety, check_inputs
from crepe_deploy.progress import Progress, silent
from crepe_deploy.store.files import disk_errors, require_disk

from .sample import Band, LayerSample, band_starts, cut_band

SKETCH_ROWS = 64
BANDS = 4
BAND_HEIGHT = 4
_VECTORS = ("column_sums", "col_norm", "sketch", "token_sketch")


@dataclass(frozen=True)
class SampleRule:
    """How much of a model is kept. reach: rows on either side of a band, half the widest window."""

    reach: int
    bands: int = BANDS
    height: int = BAND_HEIGHT
    sketch_rows: int = SKETCH_ROWS
    seed: int = 0

    def size_bytes(self, specs: list[LinearSpec]) -> int:
        """At most this much is kept of these layers, weights counted as float32."""
        high = self.height + 2 * self.reach
        rows = [self.bands * min(high, spec.out_features) + 2 * self.sketch_rows + 2 for spec in specs]
        return sum(4 * spec.in_features * count for spec, count in zip(specs, rows, strict=True))


class InputSums:
    """Running sums over one linear input: squares (in,) and the two sketches (r, in), fp32."""

    def __init__(self, width: int, rule: SampleRule, generator: torch.Generator, device: torch.device = CPU) -> None:
        self.squares = torch.zeros(width, device=device)
        self.sketch = torch.zeros(rule.sketch_rows, width, device=device)
        self.token_sketch = torch.zeros(rule.sketch_rows, width, device=device)
        self.variety = Variety()
        self._generator = generator

    def add(self, batch: Tensor) -> None:
        """`batch` (..., in), any float dtype."""
        rows = batch.reshape(-1, batch.shape[-1]).float()
        self.variety.see(rows)
        squares = rows.square()
        self.squares += squares.sum(0)
        shape = (len(self.sketch), len(rows))
        drawn = torch.randint(2, shape, generator=self._generator)  # on the host: the same wherever it computes
        signs = drawn.to(rows.device).float().mul_(2).sub_(1).div_(math.sqrt(shape[0]))
        self.sketch.addmm_(signs, rows)
        lengths = squares.sum(1).sqrt_().clamp_(min=1e-30)
        self.token_sketch.addmm_(signs / lengths, rows)


def collect(
    decoder: Decoder,
    targets: list[list[LinearSpec]],
    tokens: Tensor,
    rule: SampleRule,
    folder: Path,
    step: Progress = silent,
) -> list[LayerSample]:
    """Run the dense model over `tokens` (samples, length), keep a sample of every target, and return it.

    Each block's part is written to `folder` and read back by memory mapping, so that what is resident is one block and
    whatever the system cares to keep of the rest. Raises DiskFullError, CheckpointError.
    """
    require_disk(folder, rule.size_bytes([spec for block in targets for spec in block]))
    generator = torch.Generator().manual_seed(rule.seed)
    stream = embed(decoder, [tokens])[0]
    layers: list[LayerSample] = []
    for index, specs in enumerate(targets):
        with decoder.block(index) as (block, weights), torch.inference_mode():
            sums = _run_block(stream, block, index, specs, rule, generator)
            layer_samples = [
                _sample(spec, weights[spec.key], sums[spec.path], stream, rule, generator) for spec in specs
            ]
        layers += _through_disk(folder / f"block-{index:04d}.safetensors", layer_samples)
        step(index + 1, len(targets))
    return layers


def _run_block(
    stream: Stream, block: nn.Module, index: int, specs: list[LinearSpec], rule: SampleRule, generator: torch.Generator
) -> dict[str, InputSums]:
    sums: dict[str, InputSums] = {}
    with _watching(block, specs, sums, rule, generator):
        stream.run(block, index, advance=True)
    return sums


@contextmanager
def _watching(
    block: nn.Module, specs: list[LinearSpec], sums: dict[str, InputSums], rule: SampleRule, generator: torch.Generator
) -> Iterator[None]:
    """Fill `sums` by module path while the block runs; linears that are given one tensor share one entry."""
    seen: list[tuple[Tensor, InputSums]] = []

    def hook(path: str) -> Any:
        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            shared = next((entry for tensor, entry in seen if tensor is args[0]), None)
            if shared is not None and sums.setdefault(path, shared) is shared:
                return
            entry = sums.setdefault(path, InputSums(args[0].shape[-1], rule, generator, args[0].device))
            entry.add(args[0])
            seen.append((args[0], entry))

        return note

    handles = [block.get_submodule(spec.path).register_forward_pre_hook(hook(spec.path)) for spec in specs]
    handles.append(block.register_forward_hook(lambda *_: seen.clear()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sample(
    spec: LinearSpec, stored: Tensor, sums: InputSums, stream: Stream, rule: SampleRule, generator: torch.Generator
) -> LayerSample:
    weight = stored.T if spec.transposed else stored
    col_norm = (sums.squares / stream.sequences).sqrt()
    check_inputs(spec.key, Stats(col_norm=col_norm), varied=sums.variety.varied)
    places = band_starts(len(weight), rule.bands, rule.height, generator)
    return LayerSample(
        key=spec.key,
        out_features=spec.out_features,
        bands=tuple(cut_band(weight, start, height, rule.reach) for start, height in places),
        column_sums=weight.abs().float().sum(0),
        col_norm=col_norm,
        sketch=sums.sketch,
        token_sketch=sums.token_sketch,
    )


def _through_disk(path: Path, layers: list[LayerSample]) -> list[LayerSample]:
    """Write the tensors of `layers` and return the same layers on memory-mapped ones, which are the host's."""
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors |= {f"{layer.key}/{name}": getattr(layer, name).clone().cpu() for name in _VECTORS}
        tensors |= {f"{layer.key}/{band.start}": band.weight.contiguous().cpu() for band in layer.bands}
    with disk_errors(path):
        save_file(tensors, path)  # which does not say of every failure that it failed
        try:
            mapped = load_file(path)
        except RuntimeError as error:  # torch's, where it may not open what safetensors could
            raise OutputError(f"{path} cannot be read again: {error}") from error
    return [
        LayerSample(
            layer.key,
            layer.out_features,
            tuple(Band(mapped[f"{layer.key}/{b.start}"], b.start, b.height, b.above) for b in layer.bands),
            *(mapped[f"{layer.key}/{name}"] for name in _VECTORS),
        )
        for layer in layers
    ]
