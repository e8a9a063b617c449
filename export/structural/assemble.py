"""Structural pruning's last step: a physically smaller checkpoint from a dense one and what each layer keeps.

Tensors are sliced one at a time as they stream through, the output projections replaced by their refit versions. The
result is reopened and must compute what the dense model computes with the dropped heads and neurons masked.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import ConfigError
from ...model.architecture import content_with_sizes
from ...model.calibrate import embed
from ...model.decoder import PROOF_DTYPE, Decoder
from ...model.proof import check_parity
from ...nearest import unknown
from ...progress import Meter, Progress, silent
from ...store.checkpoint import CheckpointReader
from ...store.companions import copy_companions
from ...store.files import require_disk, write_json
from ...store.folders import atomic_folder, check_output
from ...store.manifest import Manifest, inherit, versions
from ...store.pieces import Pieces
from ...store.sources import Model, describe_source
from ...store.writing import CheckpointWriter, Planned
from ...structural import layout as layouts
from ...structural.check import check_shapes
from ...structural.layout import Content, Widths
from ...structural.plan import Geometry, Plans
from ...structural.slicing import in_layer, masked, padded, sized, sliced
from ..frame.exporter import Words
from ..frame.greedy import GREEDY_TOKENS, record_greedy
from ..frame.run import finish
from .words import LAYOUT_WORDS

Transform = Callable[[int, str, Tensor], Tensor]
LAYOUTS = ("plugin", "deci")
PROBE_TOKENS = 64
_CODE = Path(layouts.__file__).parent


@dataclass(frozen=True)
class Layout:
    """How the sliced tensors are written.

    content: `config.json`. proof: the `config.json` with which crepe-deploy's own classes compute the same, where it is
    another. kept, written: the widths of each layer before and after padding. code: files to lie beside the weights.
    zero_o_bias: whether o_proj gets biases of zeros.
    """

    name: str
    content: Content
    proof: Content
    kept: list[Widths]
    written: list[Widths]
    code: tuple[str, ...] = ()
    zero_o_bias: bool = False

    @property
    def format(self) -> str:
        """What the manifest calls the folder: only our own classes and the families' read it as a dense one."""
        return "deci" if self.name == "deci" else "dense"

    @property
    def words(self) -> Words:
        """What the card says."""
        return LAYOUT_WORDS[self.name]


def choose_layout(
    content: Content, geometry: Geometry, kept: Sequence[Widths], widths: str, layout: str = "plugin",
    remote_code: bool = False,
) -> Layout:  # fmt: skip
    """The layout for these widths. Raises ConfigError for options or widths that do not fit, UnsupportedModel."""
    if widths not in ("uniform", "per-layer"):
        raise ConfigError(f"widths '{widths}' are unknown; known: uniform, per-layer")
    if layout not in LAYOUTS:
        raise ConfigError(unknown("layout", layout, LAYOUTS))
    if (layout == "deci" or remote_code) and widths == "uniform":
        raise ConfigError("uniform widths are a plain checkpoint, with neither --layout deci nor --remote-code")
    if layout == "deci" and remote_code:
        raise ConfigError("--remote-code adds modelling files for transformers; --layout deci has vLLM's own model")
    stated = list(kept)
    if widths == "uniform":
        written = layouts.uniform_content(content, geometry.head_dim, stated)
        zeros = layouts.has_zero_o_bias(content, written)
        return Layout("uniform", written, written, stated, stated, zero_o_bias=zeros)
    if layout == "deci":
        return deci_layout(content, geometry.head_dim, geometry.kv_heads, stated)
    written = layouts.per_layer_content(content, geometry.head_dim, stated, geometry.kv_heads, remote_code=remote_code)
    code = ("configuration_crepe.py", "modeling_crepe.py") if remote_code else ()
    return Layout("per-layer", written, written, stated, stated, code)


def deci_layout(content: Content, head_dim: int, kv_heads: int, kept: list[Widths]) -> Layout:
    """The DeciLM layout for these widths, padded to what it can say. Raises UnsupportedModel."""
    target = layouts.deci_widths(kept)
    proof = layouts.per_layer_content(content, head_dim, target, kv_heads)
    written = layouts.deci_content(content, head_dim, target)
    return Layout("deci", written, proof, kept, target, ("configuration_decilm.py",))


def assemble(
    source: Model,
    plans: Plans,
    out: Path,
    *,
    widths: Literal["uniform", "per-layer"] = "per-layer",
    layout: str = "plugin",
    remote_code: bool = False,
    overwrite: bool = False,
    record: dict[str, Any] | None = None,
    calibration: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    step: Progress = silent,
) -> Manifest:
    """Write what `plans` keep of `source` into the folder `out`, which appears whole and proven or not at all.

    plans: one for each layer; read several times, one at a time, so they may lie on disk. widths: "uniform" wants
    equal widths and writes a checkpoint for any server; "per-layer" one for transformers and vLLM with crepe-deploy
    installed. layout: "deci" instead writes per-layer widths for stock vLLM. remote_code: put the modelling files
    beside the weights. record, calibration, metrics: what the manifest is to say of how the plans were found.
    Raises ConfigError, UnsupportedModel, OutputError before any work; NumericalError, DiskFullError, ParityError.
    """
    check_output(out, overwrite=overwrite, inputs=(source.folder,))
    decoder = Decoder(source.folder, PROOF_DTYPE)
    content = content_with_sizes(source.folder, decoder.config)
    layouts.check_family(content)
    geometry = Geometry.from_config(decoder.config)
    kept = _checked(plans, geometry)
    chosen = choose_layout(content, geometry, kept, widths, layout, remote_code)

    plan_of = functools.lru_cache(maxsize=1)(plans.__getitem__)  # for the tensors of one layer, which lie together

    def transform(index: int, path: str, tensor: Tensor) -> Tensor:
        small = sliced(path, tensor, plan_of(index), geometry)
        return padded(path, small, chosen.kept[index], chosen.written[index], geometry.head_dim)

    tick = Meter(step, 2 * geometry.layers + GREEDY_TOKENS)
    with atomic_folder(out, overwrite=overwrite) as folder:
        plan = plan_sliced(decoder.reader, chosen, geometry.head_dim)
        require_disk(folder, sum(planned.size_bytes for planned in plan.values()))
        write_sliced(decoder.reader, folder, plan, chosen, transform, tick)
        copy_companions(source.folder, folder)
        write_json(folder / "config.json", chosen.proof)
        proven = _prove(folder, decoder, plans, geometry, tick)
        measured = {
            **(metrics or {}), **proven, "greedy": record_greedy(folder, tick=tick),
            "parameters": _parameters(plans, geometry), "size": relative_size(folder, decoder.reader, {}),
        }  # fmt: skip
        config = {"method": "structural", **(record or {}), "pattern": "structural"}
        config["structural"] = {**layer_record(chosen), "dense": list(_dense(geometry))}
        described = describe_source(source)
        manifest = Manifest(
            stage="structural", format=chosen.format, versions=versions(), source=described,
            config=config, calibration=calibration, dense_tensors=sorted(CheckpointReader(folder).tensors),
            metrics=measured, parent=inherit(source.folder, folder, described.files),
        )  # fmt: skip
        seal(folder, chosen)
        return finish(folder, manifest, chosen.words, {})


def _checked(plans: Plans, geometry: Geometry) -> list[Widths]:
    if len(plans) != geometry.layers:
        raise ConfigError(f"{len(plans)} layers are planned, and the model has {geometry.layers}")
    kept = []
    for index in range(geometry.layers):
        plan = plans[index]
        try:
            plan.check(geometry)
        except ConfigError as error:
            raise ConfigError(f"layer {index}: {error}") from error
        kept.append(Widths(*plan.widths))
    return kept


def plan_sliced(reader: CheckpointReader, layout: Layout, head_dim: int) -> dict[str, Planned]:
    """What is written, from headers alone: the source's own shards, sliced to the layout's widths."""
    projections = layouts.written_projections(layout.content)
    plan: dict[str, Planned] = {}
    for info in reader:
        place = in_layer(info.name)
        shape = info.shape
        if place is not None:
            shape = sized(place[1], info.shape, layout.written[place[0]], head_dim, projections)
        plan[info.name] = Planned(info.file.name, info.dtype, shape)
        if layout.zero_o_bias and place is not None and place[1] == f"{projections.output}.weight":
            plan[info.name.removesuffix("weight") + "bias"] = Planned(info.file.name, info.dtype, shape[:1])
    return plan


def write_sliced(
    reader: CheckpointReader, folder: Path, plan: dict[str, Planned], layout: Layout, transform: Transform,
    tick: Meter, pieces: Pieces | None = None,
) -> None:  # fmt: skip
    """Stream every tensor through `transform` as planned; a tick for each layer's output projection.

    pieces: as of `CheckpointWriter`.
    """
    output = f"{layouts.written_projections(layout.content).output}.weight"
    with CheckpointWriter(folder, plan, pieces=pieces) as writer:
        missing = set(writer.pending)
        for name in (info.name for info in reader if info.name not in missing):
            if (place := in_layer(name)) is not None and place[1] == output:
                tick.before()
        for info in writer.left(reader):
            place = in_layer(info.name)
            tensor = reader.load_finite(info.name)
            writer.write(info.name, tensor if place is None else transform(*place, tensor))
            if place is not None and place[1] == output:
                tick()
        for name in writer.pending:
            writer.write(name, torch.zeros(plan[name].shape, dtype=plan[name].dtype))


def _prove(
    folder: Path, decoder: Decoder, plans: Plans, geometry: Geometry, tick: Callable[[], None]
) -> dict[str, Any]:
    """Compare the written folder's logits with the masked dense model's, in float64. Raises ParityError."""
    tokens = probe_tokens(decoder)
    parity = check_parity(folder, PROOF_DTYPE, tokens, masked_logits(decoder, plans, geometry, tokens, tick))
    return {"parity": {**parity, "what": "logits of the smaller files against the dense model, masked, in float64"}}


def masked_logits(
    decoder: Decoder, plans: Plans, geometry: Geometry, tokens: Tensor,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:  # fmt: skip
    """Logits (batch, length, vocab) of the dense model with dropped heads and neurons masked and refits in place.

    The weights are those of the files' dtype, computed with in the decoder's.
    """
    (stream,) = embed(decoder, [tokens])
    for index in range(len(decoder.blocks)):
        plan = plans[index]
        with decoder.block(index) as (block, weights):
            for key, tensor in weights.items():
                place = in_layer(key)
                if place is not None and (whole := masked(place[1], tensor, plan, geometry)) is not tensor:
                    block.get_parameter(place[1]).data = whole.to(decoder.dtype)
            stream.run(block, index, advance=True)
        tick()
    return decoder.logits(tokens, torch.cat(stream.hidden))


def probe_tokens(decoder: Decoder) -> Tensor:
    """Random tokens (1, <=64), the same for the same vocabulary, on which two models are compared."""
    length = min(PROBE_TOKENS, decoder.context_length)
    return torch.randint(decoder.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def layer_record(layout: Layout) -> dict[str, Any]:
    """What the manifest says of the widths under `config.structural`."""
    padding = {"padded_to": [list(widths) for widths in layout.written]} if layout.written != layout.kept else {}
    layers = [list(widths) for widths in layout.kept]
    return {"layout": layout.name, "order": list(Widths._fields), "layers": layers, **padding}


def _dense(geometry: Geometry) -> Widths:
    """What every layer of the dense model has."""
    return Widths(geometry.heads, geometry.kv_heads, geometry.intermediate)


def _parameters(plans: Plans, geometry: Geometry) -> dict[str, Any]:
    kept = sum(plans[index].parameters(geometry) for index in range(geometry.layers))
    return {
        "prunable_dense": geometry.parameters,
        "prunable_kept": kept,
        "kept": kept / geometry.parameters,
        "what": "weights and biases of heads and neurons, without norms, embeddings and the head",
    }


def seal(folder: Path, layout: Layout) -> None:
    """The final configuration and code, and the shapes checked once more. Raises CheckpointError."""
    write_json(folder / "config.json", layout.content)
    for name in layout.code:
        shutil.copyfile(_CODE / name, folder / name)
    check_shapes(folder)


def relative_size(folder: Path, source: CheckpointReader, before: dict[str, Any]) -> dict[str, Any]:
    """Over the dense model; `before`: the same of `source`, where that is no dense one."""
    written = CheckpointReader(folder)
    layers = [sum(info.size_bytes for info in reader if in_layer(info.name)) for reader in (source, written)]
    whole, after = (sum(path.stat().st_size for path in reader.files) for reader in (source, written))
    return {
        "weight_bytes_over_dense": before.get("weight_bytes_over_dense", 1.0) * layers[1] / layers[0],
        "file_bytes_over_dense": before.get("file_bytes_over_dense", 1.0) * after / whole,
        "what": "bytes of the decoder layers, and of all weight files, over the dense model's",
    }
