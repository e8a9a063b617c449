"""A run's fixed parts, and everything that can be refused before any weight is read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from crepe_deploy.device import CPU
from crepe_deploy.errors import ConfigError
from crepe_deploy.model.architecture import content_with_sizes
from crepe_deploy.model.decoder import Decoder
from crepe_deploy.phases import Phases
from crepe_deploy.progress import Say, Show
from crepe_deploy.pruning.steps import Steps
from crepe_deploy.store.files import require_disk
from crepe_deploy.store.folders import check_output
from crepe_deploy.store.journal import Journal
from crepe_deploy.store.sources import Model, describe_source
from crepe_deploy.store.stock import check_tokenizer, config_of
from crepe_deploy.store.work import begin, work_folder
from crepe_deploy.texts import CalibrationSet

from .config import TyrConfig
from .fitness import Candidate, Reference, cache_bytes, dense_reference
from .layout import Widths, uniform_content
from .narrow import require_family
from .plan import Geometry
from .supernet import LayerLevels, Store, planned_bytes
from .units import Budget, Units, Width, even, plan_budget, split_budgets, splits

MOST_LEVELS = 9
FEW_GROUPS = 4  # with fewer KV groups a layer loses a third or more of its attention at a time, which measured worse


@dataclass
class Run:
    """budgets: of units, with per-layer widths; several are judged. shared: the splits that all layers could have,
    with uniform ones.

    held: windows between those that pruning is calibrated on and the search's, which judge repair and nothing else
    is fitted to. work: the folder of the journal and the supernets.
    """

    config: TyrConfig
    decoder: Decoder
    geometry: Geometry
    units: Units
    budgets: list[Budget]
    shared: list[Width]
    calibration: CalibrationSet
    held: int
    work: Path
    journal: Journal
    show: Show
    say: Say
    phases: Phases = field(default_factory=Phases)

    @functools.cached_property
    def reference(self) -> Reference:
        """The dense model's side of the fitness, computed when it is first needed."""
        with self.phases("reference"):
            return dense_reference(self.decoder, self.search_tokens, self.config.fitness, self.config.top_k)

    @property
    def pruning_tokens(self) -> Tensor:
        """Windows (samples, length) that local pruning is calibrated on."""
        return self.calibration.tokens[: len(self.calibration.tokens) - self.config.search_samples - self.held]

    @property
    def held_tokens(self) -> Tensor:
        """Windows (samples, length) that say which step of repair is best."""
        end = len(self.calibration.tokens) - self.config.search_samples
        return self.calibration.tokens[end - self.held : end]

    @property
    def search_tokens(self) -> Tensor:
        """Windows (samples, length) that candidates are judged on; -0 means all of them."""
        return self.calibration.tokens[-self.config.search_samples :]

    def store(self, name: str) -> Store:
        """A supernet in the working folder."""
        return Store(self.work / name, self.decoder.device)


def prepare_run(
    model: Model, out: Path, config: TyrConfig, calibration: CalibrationSet, *,
    resume: bool, overwrite: bool, show: Show, say: Say, device: torch.device = CPU,
) -> Run:  # fmt: skip
    """Refuse what cannot work, say what the run will take on this device, and open its journal.

    Raises ConfigError, OutputError, UnsupportedModel, CheckpointError, DiskFullError.
    """
    config.check()
    check_output(out, overwrite=overwrite, inputs=(model.folder,))
    decoder = Decoder(model.folder, config.dtype, device)
    require_family(decoder)
    geometry = Geometry.from_config(decoder.config)
    held = _check_windows(config, calibration, decoder)
    check_tokenizer(model.folder)
    units = config_units(config, geometry)
    budgets: list[Budget] = []
    shared: list[Width] = []
    if config.widths == "uniform":
        shared = _shared_widths(model.folder, geometry, config)
    elif config.judges_splits:
        budgets = split_budgets(units, config.sparsity)
    else:
        share = None if isinstance(config.attention_share, str) else config.attention_share
        budgets = [plan_budget(units, config.sparsity, share)]
    work = work_folder(out)
    _plan_room(work, config, units, even_splits(units, shared, budgets), calibration, decoder, say)
    identity = {
        "source": describe_source(model).model_dump(mode="json"), "calibration": calibration.record(),
        "config": asdict(config), "what": "structural pruning from judged splits",
    }  # fmt: skip
    journal = begin(work, identity, resume=resume, overwrite=overwrite)
    return Run(config, decoder, geometry, units, budgets, shared, calibration, held, work, journal, show, say)


def _check_windows(config: TyrConfig, calibration: CalibrationSet, decoder: Decoder) -> int:
    """How many windows are kept from pruning to judge repair by. Raises ConfigError."""
    samples, length = calibration.tokens.shape
    if length > decoder.context_length:
        raise ConfigError(f"windows of {length} tokens exceed the model's context of {decoder.context_length}")
    if config.search_samples >= samples:
        raise ConfigError(f"{config.search_samples} of {samples} windows are for the search: none is left to prune on")
    return Steps(repair=config.block_repair()).held_out(samples - config.search_samples)


def config_units(config: TyrConfig, geometry: Geometry) -> Units:
    """The units that a run counts in, "auto" resolved. Raises ConfigError."""
    few = geometry.kv_heads < FEW_GROUPS and geometry.queries_per_group > 1
    queries = few if config.attention == "auto" else config.attention == "queries"
    return Units(geometry, config.multiple, "queries" if queries else "groups")


def _shared_widths(folder: Path, geometry: Geometry, config: TyrConfig) -> list[Width]:
    """The splits that a plain configuration can hold. Raises ConfigError where there is none."""
    content, refused = content_with_sizes(folder, config_of(folder)), ""
    held: list[Width] = []
    for width in splits(geometry, config.multiple, config.sparsity):
        sizes = Widths(width.groups * width.queries, width.groups, width.neurons)
        try:
            uniform_content(content, geometry.head_dim, [sizes] * geometry.layers)
        except ConfigError as error:
            refused = str(error)
        else:
            held.append(width)
    if not held:
        raise ConfigError(f"no width of --widths uniform can be written as a plain configuration: {refused}")
    return held


def _plan_room(
    work: Path, config: TyrConfig, units: Units, evens: Sequence[Candidate], calibration: CalibrationSet,
    decoder: Decoder, say: Say,
) -> None:  # fmt: skip
    """Say what the search will take on disk and in memory, and refuse a disk that is too small."""
    weights = sum(info.size_bytes for info in decoder.reader)
    finished = (2 if config.repair is None else 3) * weights
    if not config.searches and not config.judges_splits:
        require_disk(work, finished)
        return
    disk = supernet_bound(config, units, evens, decoder.dtype.itemsize)
    cache = cache_bytes(decoder, calibration.tokens[-config.search_samples :], config.fitness, config.top_k)
    say(
        f"plan: a supernet takes at most {disk / 1e6:,.0f} MB in {work}, the dense model's side of the fitness "
        f"{cache / 1e6:,.0f} MB of memory"
    )
    require_disk(work, disk + finished)


def supernet_bound(config: TyrConfig, units: Units, evens: Sequence[Candidate], itemsize: int) -> int:
    """The most bytes that a supernet takes, the splits' or any iteration's; one is on disk at a time."""
    geometry = units.geometry
    judged = planned_bytes(geometry, split_levels(evens, evens[0]), itemsize)
    if config.widths == "uniform" or not config.searches:
        return judged
    attention, neurons = (
        tuple(range(max(1, count - MOST_LEVELS + 1), count + 1))
        for count in (units.attention_count, units.neuron_count)
    )
    layer = LayerLevels(
        tuple(units.attention_level(level) for level in attention), tuple(level * units.multiple for level in neurons),
        units.attention_level(attention[-1]), neurons[-1] * units.multiple,
    )  # fmt: skip
    return max(judged, planned_bytes(geometry, [layer] * geometry.layers, itemsize))


def even_splits(units: Units, shared: Sequence[Width], budgets: Sequence[Budget]) -> list[Candidate]:
    """The widths of all layers for every split that a run could start from: each of `shared` or of `budgets`."""
    if shared:
        return [(width,) * units.geometry.layers for width in shared]
    return [units.widths(even(units, budget)) for budget in budgets]


def split_levels(splits: Sequence[Candidate], centre: Candidate) -> list[LayerLevels]:
    """The levels of a supernet that holds all these widths and no others; `centre` is one of them."""
    return [
        LayerLevels(
            tuple(sorted({(width.groups, width.queries) for width in widths})),
            tuple(sorted({width.neurons for width in widths})),
            (middle.groups, middle.queries),
            middle.neurons,
        )
        for widths, middle in zip(zip(*splits, strict=True), centre, strict=True)
    ]
