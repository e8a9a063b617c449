"""Builds what configs/bench-structural*.yaml measure: `python -m crepe_deploy.bench.studies.structural_speed`.

Half of the heads' and neurons' parameters of SmolLM2-135M-Instruct (dequantised Q4_1) and of a random bf16 checkpoint
of Llama-3.2-1B's shape: once with the same widths in every layer, once with widths that vary around the same total.
What is kept is spread evenly and nothing is refit: speed does not depend on values, and no quality is claimed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import click

from ...progress import progress
from ..assets import ensure_assets
from .frame import assets_option, folder_option

if TYPE_CHECKING:
    from ...store.checkpoint import CheckpointReader
    from ...structural.layout import Widths
    from ...structural.plan import Geometry, LayerPlan

KEPT: Final = 0.5
KINDS: Final[tuple[Literal["uniform", "per-layer"], ...]] = ("uniform", "per-layer")
UNEVEN: Final = (0.75, 1.25, 1.0, 0.9, 1.1)  # a layer's neurons over the mean, in turns


@dataclass(frozen=True)
class Shape:
    """KV groups of the even layers, and in turns of the uneven ones, with all their query heads; a unit of neurons."""

    groups: int
    uneven_groups: tuple[int, ...]
    multiple: int


SHAPES: Final = {
    "smollm2": Shape(groups=2, uneven_groups=(1, 2, 3, 2, 2), multiple=32),
    "llama-1b": Shape(groups=4, uneven_groups=(2, 5, 4, 3, 6), multiple=128),
}


class EvenPlans:
    """For each layer the plan with these widths: kept units evenly spread, output columns as they were."""

    def __init__(self, reader: CheckpointReader, geometry: Geometry, widths: Sequence[Widths]) -> None:
        self.reader, self.geometry, self.widths = reader, geometry, widths

    def __len__(self) -> int:
        return len(self.widths)

    def __getitem__(self, index: int) -> LayerPlan:
        from ...structural.plan import LayerPlan, head_features

        wanted, geometry = self.widths[index], self.geometry
        groups = spread(wanted.kv_heads, geometry.kv_heads)
        queries = spread(wanted.heads // wanted.kv_heads, geometry.queries_per_group)
        neurons = spread(wanted.intermediate, geometry.intermediate)
        heads = [group * geometry.queries_per_group + query for group in groups for query in queries]
        output = self.reader.load(f"model.layers.{index}.self_attn.o_proj.weight")
        down = self.reader.load(f"model.layers.{index}.mlp.down_proj.weight")
        return LayerPlan(
            groups, (queries,) * len(groups), neurons, output[:, head_features(heads, geometry.head_dim)],
            down[:, list(neurons)],
        )  # fmt: skip


def spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` indices, evenly spread, ascending."""
    return tuple(index * total // count for index in range(count))


def even_widths(geometry: Geometry, shape: Shape, kept: float = KEPT) -> list[Widths]:
    """The same widths in every layer: the given KV groups, and as many units of neurons as come nearest to `kept`."""
    from ...structural.layout import Widths

    room = kept * geometry.parameters / geometry.layers - shape.groups * geometry.group_parameters()
    neurons = max(1, round(room / geometry.neuron_parameters / shape.multiple)) * shape.multiple
    return [Widths(shape.groups * geometry.queries_per_group, shape.groups, neurons)] * geometry.layers


def uneven_widths(geometry: Geometry, shape: Shape, kept: float = KEPT) -> list[Widths]:
    """Widths that vary from layer to layer around `kept` of the parameters in total, to within a unit of neurons."""
    from ...structural.layout import Widths

    groups = list(islice(cycle(shape.uneven_groups), geometry.layers))
    room = kept * geometry.parameters - sum(groups) * geometry.group_parameters()
    units = room / geometry.neuron_parameters / shape.multiple
    shares = list(islice(cycle(UNEVEN), geometry.layers))
    widths, given, due = [], 0, 0.0
    for count, share in zip(groups, shares, strict=True):
        due += units * share / sum(shares)
        here = max(1, round(due) - given)
        given += here
        widths.append(Widths(count * geometry.queries_per_group, count, here * shape.multiple))
    return widths


def build(root: Path, model: Path, shape: Shape) -> list[Path]:
    """The `uniform` and `per-layer` slices of `model` below `root`; what is there already is kept."""
    from ...exporting.structural import assemble
    from ...model.decoder import Decoder
    from ...store.sources import resolve_model
    from ...structural.plan import Geometry

    folders = [root / "uniform", root / "per-layer"]
    decoder = Decoder(model)
    geometry = Geometry.from_config(decoder.config)
    for folder, widths in zip(folders, KINDS, strict=True):
        if folder.is_dir():
            continue
        wanted = (even_widths if widths == "uniform" else uneven_widths)(geometry, shape)
        plans = EvenPlans(decoder.reader, geometry, wanted)
        with progress(f"slicing {model.name} to {KEPT:.0%}, {widths}") as step:
            assemble(
                resolve_model(str(model)), plans, folder, widths=widths, record={"method": "evenly spread"}, step=step
            )
    return folders


@click.command()
@folder_option("out/bench/structural")
@assets_option
@click.option("--only", type=click.Choice(list(SHAPES)), default=None, help="One of the two models.")
def main(folder: Path, assets_dir: Path, only: str | None) -> None:
    """Build the folders and print them."""
    from .llama_1b import make_llama_1b

    for name, shape in SHAPES.items():
        if only not in (None, name):
            continue
        if name == "smollm2":
            model = ensure_assets(assets_dir).model
        else:
            model = folder / name / "model"
            make_llama_1b(model)
        for built in build(folder / name, model, shape):
            click.echo(built)


if __name__ == "__main__":
    main()
