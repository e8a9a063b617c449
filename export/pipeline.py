"""`export` and `prune-and-export`: stages that meet on disk, and an output that appears whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..device import CPU
from ..errors import CrepeError, ParityError
from ..progress import Progress, silent
from ..pruning.config import PruneConfig
from ..pruning.prune import Origin, describe_origin, prune_into
from ..pruning.run_plan import RunPlan, plan_run
from ..store.files import clear, disk_errors, write_json
from ..store.folders import check_output, free_name, parents
from ..store.manifest import Manifest, load_manifest, save_manifest, verify
from ..store.pieces import Pieces
from ..store.sources import Model
from ..store.work import PRUNED, Unfinished, unfinished
from ..texts import CalibrationSet
from .frame.exporter import Exporter
from .frame.greedy import with_greedy
from .frame.importer import as_ours
from .frame.run import read_source, run
from .heal import Healing
from .registry import build, importers


def export_checkpoint(
    source: Path, out: Path, format: str, *, resume: bool = False, overwrite: bool = False, step: Progress = silent,
    options: Mapping[str, str] | None = None, base_model: str | None = None,
) -> Manifest:  # fmt: skip
    """Export the checkpoint `source` into the folder `out`; returns the manifest that was written.

    A foreign checkpoint that one of `registry.IMPORTERS` reads is made ours first. resume: go on with what a stopped
    run left in OUT.work: files of weights that are whole are not written again.
    options: of the format by name, as strings: the fields of its class in `formats/`, of onnx `flavor` ("portable",
    "genai") and `precision` ("fp32", "fp16", "int4"). Raises ConfigError, which names an option that the format does
    not take, MissingExtra, OutputError, VerifyError, ParityError.
    """
    (exporter,) = build([format], options)
    check_output(out, overwrite=overwrite, inputs=(source,))
    with parents(out), as_ours(importers(), source, out) as pruned:
        read = read_source(exporter, pruned, fresh=pruned != source)
        identity = {
            "what": "export", "format": exporter.name, "options": asdict(exporter), "base_model": base_model,
            "source": {"manifest": read.parent, **read.manifest.source.model_dump(mode="json")},
        }  # fmt: skip
        with unfinished(out, identity, resume=resume, overwrite=overwrite) as work, kept_if_wrong(work.folder, out):
            pieces = Pieces(work.journal, exporter.name)
            return run(exporter, read, work.folder, pieces, step=step, base_model=base_model)


@contextlib.contextmanager
def kept_if_wrong(folder: Path, out: Path) -> Iterator[None]:
    """What does not compute what was meant is kept as `OUT.failed`, without a manifest, to be looked into."""
    try:
        yield
    except ParityError as error:
        failed = free_name(out.with_name(out.name + ".failed"))
        folder.rename(failed)
        raise ParityError(f"{error}; what was written is kept in {failed}") from error


def prune_and_export(
    model: Model,
    out: Path,
    config: PruneConfig,
    calibration: CalibrationSet | None,
    *,
    formats: Sequence[str] = ("dense",),
    resume: bool = False,
    overwrite: bool = False,
    step: Progress = silent,
    options: Mapping[str, str] | None = None,
    healing: Healing | None = None,
    base_model: str | None = None,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Prune `model` and write `out/FORMAT/` for each format and `out/report.json`; returns the report.

    options: as of `export_checkpoint`; each format is given those that it takes, and one that none of them takes is
    refused. healing: what is done to the pruned checkpoint before it is exported. base_model: as of `run`. resume: go
    on with what a stopped run left in OUT.work: pruned blocks, steps of healing, whole formats; other formats may be
    asked for. device: that prunes. Raises what `prune`, `heal` and `export_checkpoint` raise; what an export would
    refuse is refused before pruning.
    """
    exporters = build(formats, options)
    for exporter in exporters:
        exporter.check_pruning(model.folder, config)
    plan = plan_run(model, out, config, calibration, overwrite=overwrite, device=device)
    origin = describe_origin(model, plan, calibration)
    identity = origin.identity() | {"what": "pruning for export", "healing": healing and healing.record()}
    with unfinished(out, identity, resume=resume, overwrite=overwrite) as work:
        manifest, pruned = _pruned(work, plan, origin, step)
        if healing is not None:
            pruned = healing(pruned)
        save_manifest(pruned, with_greedy(pruned, load_manifest(pruned)))  # once, for every format
        clear(work.folder, [exporter.name for exporter in exporters])
        exports = {}
        for exporter in exporters:
            target, key = work.folder / exporter.name, _key(exporter, base_model)
            if not _is_done(work, exporter, base_model):
                with disk_errors(target):
                    target.mkdir(exist_ok=True)
                with kept_if_wrong(target, out):
                    source = read_source(exporter, pruned, fresh=True)
                    pieces = Pieces(work.journal, key)
                    written = run(exporter, source, target, pieces, step=step, base_model=base_model)
                work.journal.add("format", key, _summary(exporter, written, out / exporter.name, target))
            exports[exporter.name] = work.journal.get("format", key)
        healed = {} if healing is None else {"healed": load_manifest(pruned).config["healed"]}
        report = _report(manifest, exports) | healed
        write_json(work.folder / "report.json", report)
    return report


def _pruned(work: Unfinished, plan: RunPlan, origin: Origin, step: Progress) -> tuple[Manifest, Path]:
    """The manifest and the folder of the pruned checkpoint; one that is whole is not pruned again."""
    folder = work.work / PRUNED
    if work.journal.get("stage", PRUNED) is None or not _is_whole(folder):
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        prune_into(folder, work.journal, plan, origin, step)
        work.journal.add("stage", PRUNED, True)
    return load_manifest(folder), folder


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except CrepeError:
        return False
    return True


def _is_done(work: Unfinished, exporter: Exporter[Any], base_model: str | None) -> bool:
    """Whether a stopped run has written this format whole, with the same options."""
    summary = work.journal.get("format", _key(exporter, base_model), _is_summary)
    return summary is not None and _is_whole(work.folder / exporter.name)


def _key(exporter: Exporter[Any], base_model: str | None) -> str:
    return f"{exporter!r} {base_model}"


def _summary(exporter: Exporter[Any], manifest: Manifest, final: Path, folder: Path) -> dict[str, Any]:
    weights = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in exporter.suffixes)
    return {"path": str(final), "weight_file_bytes": weights, "size": manifest.metrics["size"]}


def _is_summary(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"path", "weight_file_bytes", "size"}


def _report(manifest: Manifest, exports: dict[str, Any]) -> dict[str, Any]:
    """What a user or a machine wants at a glance; the manifests hold the rest."""
    return {
        "source": manifest.source.model_dump(mode="json"),
        "method": manifest.config["method"],
        "parameters": manifest.config["resolved_method"],
        "recipe": manifest.config["recipe"],
        "steps": manifest.config["resolved_steps"],
        "pattern": manifest.config["pattern"],
        "patterns": manifest.metrics["patterns"],
        "feed": manifest.config["feed"],
        "calibration": manifest.calibration,
        "sparsity_of_pruned_tensors": manifest.metrics["sparsity_of_pruned_tensors"],
        "pruned_tensors": manifest.metrics["pruned_tensors"],
        "mean_layer_error": manifest.metrics["mean_layer_error"],
        "rescale": manifest.metrics.get("rescale"),
        "limits": manifest.metrics.get("limits", []),
        "parity": manifest.metrics["parity"],
        "seconds": manifest.metrics["seconds"],
        "versions": manifest.versions,
        "formats": exports,
        **({"chosen": chosen} if (chosen := manifest.config.get("chosen")) else {}),
    }
