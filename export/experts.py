"""What `experts` writes: OUT/dense/, the model with fewer experts, OUT/scores.safetensors and OUT/report.json.

Nothing of the weights is computed anew: rows and whole experts are left out as the tensors stream by. What was written
is reopened and must compute what the whole model computes whose routers know only the experts that stay.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..device import CPU
from ..machine import peak_rss_bytes
from ..model.blocks import expert_layer
from ..model.calibrate import embed
from ..model.decoder import PROOF_DTYPE, Decoder
from ..model.proof import check_parity
from ..moe.choose import chosen, effective
from ..moe.config import ExpertsConfig
from ..moe.cut import Cut, cut_content, cut_of, masked
from ..moe.kept import Kept
from ..moe.layers import ExpertLayers, expert_layers
from ..moe.measure import LayerStats, measure
from ..moe.scores import SCORES_NAME, Scores, load_scores
from ..progress import Meter, Show
from ..store.checkpoint import CheckpointReader, read_config
from ..store.companions import copy_companions
from ..store.files import clear, disk_errors, require_disk, write_json
from ..store.folders import check_output
from ..store.manifest import Manifest, Source, inherit, sha256_file, versions
from ..store.pieces import Pieces
from ..store.readback import prove_written
from ..store.sources import Model, describe_source
from ..store.stock import check_tokenizer
from ..store.work import unfinished
from ..store.writing import CheckpointWriter
from ..texts import CalibrationSet
from .frame import usage
from .frame.exporter import Words
from .frame.greedy import GREEDY_TOKENS, record_greedy
from .frame.run import finish
from .pipeline import kept_if_wrong
from .structural.assemble import relative_size

PROBE_TOKENS: Final = 256
OWN: Final = (SCORES_NAME,)
WORDS: Final = Words(
    "Whole experts were removed, equally many of every layer: an ordinary model with fewer experts, which every reader "
    "and server of the whole one loads. It takes less memory; a token takes as much work as before.",
    layers="decoder",
    use=usage.PLAIN,
)


@dataclass(frozen=True)
class _Run:
    """What one run of `remove_experts` knows from the start."""

    model: Model
    config: ExpertsConfig
    decoder: Decoder
    layers: ExpertLayers
    source: Source
    show: Show
    base_model: str | None


def remove_experts(
    model: Model, out: Path, config: ExpertsConfig, calibration: Callable[[], CalibrationSet] | None,
    scores: Path | None, *, resume: bool = False, overwrite: bool, show: Show, base_model: str | None = None,
    device: torch.device = CPU,
) -> dict[str, Any]:  # fmt: skip
    """Write `model` without some of its experts into `out`, whole and proven or not at all; returns the report.

    calibration: makes the windows that experts are measured on, once nothing else can be refused; or else scores: what
    an earlier run measured. resume: go on with what a stopped run left in OUT.work: at most one layer is measured and
    one file written again. device: to measure on; the proof is the CPU's. Raises ConfigError, UnsupportedModel,
    CheckpointError, OutputError before any work; NumericalError, DiskFullError, ParityError.
    """
    started = time.monotonic()
    check_output(out, overwrite=overwrite, inputs=(model.folder,), own=OWN)
    decoder = Decoder(model.folder, config.dtype, device, experts=True)
    layers = expert_layers(decoder)
    layers.count_removed(config.remove)
    check_tokenizer(model.folder)
    loaded = None if scores is None else load_scores(scores)
    windows = None if calibration is None else calibration()
    run = _Run(model, config, decoder, layers, describe_source(model), show, base_model)
    if loaded is not None and scores is not None:
        loaded.require(scores, run.source, layers, decoder.vocab_size)
    identity = {
        "what": "removing experts", "source": run.source.model_dump(mode="json"), "config": asdict(config),
        "calibration": None if windows is None else windows.record(), "base_model": base_model,
        "scores": None if scores is None else sha256_file(scores), "device": device.type,
    }  # fmt: skip
    unfinished_run = unfinished(out, identity, resume=resume, overwrite=overwrite, own=OWN)
    with unfinished_run as work, kept_if_wrong(work.folder, out):
        folder = work.folder
        clear(folder, ("dense",))
        kept = Kept(work.journal, work.work)
        states = 0 if windows is None else kept.room(decoder, windows.tokens)
        require_disk(folder, states + sum(info.size_bytes for info in decoder.reader))
        found = loaded if windows is None else _measured(run, windows, kept)
        assert found is not None  # one of the two is given
        found.save(folder / SCORES_NAME)
        manifest = _write(run, folder / "dense", found, Pieces(work.journal, "dense"))
        report = {
            "removed": manifest.config["experts"]["removed"],
            **{name: manifest.config[name] for name in ("method", "experts")},
            "scores": {"path": str(out / SCORES_NAME), "measured_now": loaded is None},
            "calibration": found.calibration,
            **manifest.metrics,
            "dense": {"path": str(out / "dense")},
            "seconds": round(time.monotonic() - started, 2),
            "peak_rss_bytes": peak_rss_bytes(),
            "versions": versions(),
        }
        write_json(folder / "report.json", report)
    return {"out": str(out), **report}


def _measured(run: _Run, windows: CalibrationSet, kept: Kept) -> Scores:
    with run.show("measuring experts") as step:
        stats = measure(run.decoder, windows.tokens, step, kept)
    record = {"dtype": str(run.decoder.dtype).removeprefix("torch.")}
    return Scores(stats, windows.tokens[:1, :PROBE_TOKENS].clone(), windows.record(), run.source.files, record)


def _write(run: _Run, folder: Path, scores: Scores, pieces: Pieces) -> Manifest:
    """The model folder. Its weights are written and read back before anything is computed with them."""
    decoder, layers = run.decoder, run.layers
    kept = chosen(scores.layers, layers, run.config)
    cut = cut_of(decoder, kept)
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    clear(folder, pieces.names)
    with run.show("writing and proving") as step:
        tick = Meter(step, len(decoder.blocks) + 2 + GREEDY_TOKENS)
        hashes = _write_weights(decoder, cut, folder, pieces)
        tick()
        copy_companions(run.model.folder, folder)
        count = layers.experts - layers.count_removed(run.config.remove)
        write_json(folder / "config.json", cut_content(read_config(folder), decoder.config, count))
        proven = _prove(run, folder, kept, scores.probe, tick)
        tick()
        metrics = {
            **proven, "greedy": record_greedy(folder, tick=tick), "parameters": _parameters(layers, folder),
            "size": relative_size(folder, decoder.reader, {}), "unrouted": _unrouted(scores.layers, kept),
        }  # fmt: skip
    config = {
        "method": run.config.method, "pattern": "experts", "resolved_method": {}, **asdict(run.config),
        "experts": {
            "before": layers.experts, "kept": count, "removed": layers.experts - count, "per_token": layers.per_token,
            "groups": layers.groups, "layers": {str(index): stay for index, stay in kept.items()},
            "left_whole": layers.beyond,
        },
        **({"base_model": run.base_model} if run.base_model else {}),
    }  # fmt: skip
    manifest = Manifest(
        stage="experts", format="dense", versions=versions(), source=run.source, config=config,
        calibration=scores.calibration, dense_tensors=sorted(CheckpointReader(folder).tensors), metrics=metrics,
        parent=inherit(run.model.folder, folder, run.source.files),
    )  # fmt: skip
    return finish(folder, manifest, WORDS, hashes)


def _write_weights(decoder: Decoder, cut: Cut, folder: Path, pieces: Pieces) -> dict[str, str]:
    """Stream what stays into `folder` and read it back; sha256 by file. Raises ParityError."""
    with CheckpointWriter(folder, cut.plan(decoder), pieces=pieces) as writer:
        missing = set(writer.pending)
        for info in decoder.reader:
            name = cut.names.get(info.name, info.name)
            if name in missing:
                writer.write(name, cut.applied(info.name, decoder.reader.load(info.name)))
    return prove_written(folder, writer.fingerprints)


def _prove(
    run: _Run, folder: Path, kept: Mapping[int, list[int]], tokens: Tensor, tick: Callable[[], None]
) -> dict[str, Any]:
    """Logits of the files against the whole model's with the gone experts masked, in float64; routers on the way."""
    decoder = Decoder(run.model.folder, PROOF_DTYPE, experts=True)
    assert decoder.experts is not None
    (whole,) = embed(decoder, [tokens])
    less, used = whole.twin(), defaultdict[str, list[float]](list)
    for index in range(len(decoder.blocks)):
        with decoder.block(index) as (block, _):
            layer = expert_layer(block, decoder.experts)
            if layer is None:
                whole.run(block, index, advance=True)
                less.run(block, index, advance=True)
            else:
                with _counted(layer[0], run.layers.experts) as picks:
                    whole.run(block, index, advance=True)
                used["before"].append(effective(picks))
                with masked(block, decoder.experts, kept[index]), _counted(layer[0], run.layers.experts) as picks:
                    less.run(block, index, advance=True)
                used["after"].append(effective(picks))
        tick()
    parity = check_parity(folder, PROOF_DTYPE, tokens, decoder.logits(tokens, torch.cat(less.hidden)))
    return {
        "parity": {**parity, "what": "logits of the files against the whole model, gone experts masked, in float64"},
        "effective_experts": {
            **{name: sum(values) / len(values) for name, values in used.items()},
            "tokens": tokens.shape[1],
            "what": "exp of the entropy of the routers' choices, mean over layers",
        },
    }


def _unrouted(stats: Mapping[int, LayerStats], kept: Mapping[int, list[int]]) -> dict[str, int]:
    """How many experts saw no calibration token, in all layers, and how many of these stay."""
    unseen = {index: set((one.tokens == 0).nonzero().flatten().tolist()) for index, one in stats.items()}
    return {
        "experts": sum(map(len, unseen.values())),
        "kept": sum(len(unseen[index] & set(stay)) for index, stay in kept.items()),
    }


def _parameters(layers: ExpertLayers, folder: Path) -> dict[str, Any]:
    held = expert_layers(Decoder(folder, experts=True)).sizes()
    return {
        "before": layers.sizes(),
        "after": held,
        "what": "held: all in the files; active: without the experts that a token is not routed to",
    }


@contextlib.contextmanager
def _counted(router: nn.Module, experts: int) -> Iterator[Tensor]:
    """Inside, how often a router chooses each expert is added up."""
    picks = torch.zeros(experts, dtype=torch.long)

    def add(_module: nn.Module, _args: Any, returned: tuple[Tensor, Tensor, Tensor]) -> None:
        picks.add_(torch.bincount(returned[2].flatten(), minlength=experts))

    handle = router.register_forward_hook(add)
    try:
        yield picks
    finally:
        handle.remove()
