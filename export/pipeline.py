"""`export` and `prune-and-export`: stages that meet on disk, and an output that appears whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, ParityError
from ..model.architecture import load_config
from ..model.decoder import Decoder
from ..packed.config import packed_config
from ..progress import Progress, silent
from ..pruning.config import PruneConfig
from ..pruning.prune import prune
from ..store.files import write_json
from ..store.folders import atomic_folder, check_output
from ..store.manifest import Manifest, save_manifest
from ..store.sources import Model
from ..texts import CalibrationSet
from .bitmask24 import pruned_folder
from .dense import export_dense
from .greedy import with_greedy
from .int8 import export_int8, int8_tensors
from .onnx.export import export_onnx
from .onnx.support import DEFAULT, OnnxOptions, check_model, check_options
from .packed import export_packed
from .structural import export_deci

Exporter = Callable[..., Manifest]
EXPORTERS: dict[str, Exporter] = {
    "dense": export_dense,
    "packed": export_packed,
    "int8": export_int8,
    "onnx": export_onnx,
    "deci": export_deci,
}


def check_formats(formats: Sequence[str]) -> list[str]:
    """Refuse unknown, missing or repeated formats. Raises ConfigError listing the known."""
    for name in formats:
        if name not in EXPORTERS:
            raise ConfigError(f"format '{name}' is unknown; known: {', '.join(EXPORTERS)}")
    if not formats or len(set(formats)) != len(formats):
        raise ConfigError(f"--format needs one or more different formats of: {', '.join(EXPORTERS)}")
    return list(formats)


def export_checkpoint(
    source: Path, out: Path, format: str, *, overwrite: bool = False, step: Progress = silent,
    onnx: OnnxOptions = DEFAULT,
) -> Manifest:  # fmt: skip
    """Export the checkpoint `source` into the folder `out`. Raises ConfigError, OutputError, VerifyError.

    A `sparse-24-bitmask` checkpoint of compressed-tensors is unpacked first, see `bitmask24`. onnx: for that format.
    """
    check_formats([format])
    if format == "onnx":
        check_options(onnx)
    check_output(out, overwrite=overwrite, inputs=(source,))
    with (
        atomic_folder(out, overwrite=overwrite) as folder,
        pruned_folder(source, out) as pruned,
        kept_if_wrong(folder, out),
    ):
        return exporter(format, onnx)(pruned, folder, link=pruned != source, step=step)


def exporter(format: str, onnx: OnnxOptions) -> Exporter:
    """The exporter of this format, told its own options."""
    return functools.partial(export_onnx, options=onnx) if format == "onnx" else EXPORTERS[format]


@contextlib.contextmanager
def kept_if_wrong(folder: Path, out: Path) -> Iterator[None]:
    """What does not compute what was meant is kept as `OUT.failed`, without a manifest, to be looked into."""
    try:
        yield
    except ParityError as error:
        failed = out.with_name(out.name + ".failed")
        shutil.rmtree(failed, ignore_errors=True)
        folder.rename(failed)
        raise ParityError(f"{error}; what was written is kept in {failed}") from error


def prune_and_export(
    model: Model,
    out: Path,
    config: PruneConfig,
    calibration: CalibrationSet | None,
    *,
    formats: Sequence[str] = ("dense",),
    overwrite: bool = False,
    step: Progress = silent,
    onnx: OnnxOptions = DEFAULT,
) -> dict[str, Any]:
    """Prune `model` and write `out/FORMAT/` for each format and `out/report.json`; returns the report."""
    check_formats(formats)
    if "packed" in formats:
        packed_config(config.pattern)  # refused before pruning rather than after
    if "deci" in formats:
        raise ConfigError("--format deci is for folders with widths per layer: crepe-deploy export DIR --format deci")
    if "int8" in formats:
        int8_tensors(Decoder(model.folder))
    if "onnx" in formats:
        check_options(onnx)
        check_model(load_config(model.folder), onnx.flavor)
    check_output(out, overwrite=overwrite, inputs=(model.folder,))
    with atomic_folder(out, overwrite=overwrite) as folder:
        pruned = folder / "pruned"
        manifest = prune(model, pruned, config, calibration, step=step)
        save_manifest(pruned, with_greedy(pruned, manifest))  # once, for every format
        exports = {}
        for name in formats:
            target = folder / name
            target.mkdir()
            with kept_if_wrong(target, out):
                written = exporter(name, onnx)(pruned, target, link=name == "dense")
            exports[name] = _summary(written, out / name, target)
        shutil.rmtree(pruned)
        report = _report(manifest, exports)
        write_json(folder / "report.json", report)
    return report


def _summary(manifest: Manifest, final: Path, folder: Path) -> dict[str, Any]:
    kinds = {".safetensors", ".onnx", ".data"}
    weights = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in kinds)
    return {"path": str(final), "weight_file_bytes": weights, "size": manifest.metrics["size"]}


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
    }
