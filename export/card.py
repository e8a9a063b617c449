"""The model card of an exported checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..manifest import Manifest
from ..writing import disk_errors

CARD_NAME = "README.md"

_TRUTH = {
    "dense": (
        "The zeros are stored explicitly: every Hugging Face reader loads this folder unchanged, and none of them is "
        "smaller or faster for it. Export with `--format packed` for a smaller file."
    ),
    "packed": (
        "The pruned weights are stored without their zeros, in the format `crepe-nm`: smaller on disk and in memory. "
        "transformers (after `import crepe_deploy`) and vLLM (by itself, once crepe-deploy is installed) run it from "
        "the packed weights on a CPU; on a GPU the weights are expanded at load, so there it is a smaller download "
        "and nothing more. Readers without crepe-deploy refuse it. `crepe-deploy export --format dense` gives the "
        "plain folder back, bit by bit."
    ),
}


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write `README.md` from the manifest: base model, inherited licence, method, pattern and counted numbers."""
    with disk_errors(folder):
        (folder / CARD_NAME).write_text(card_text(manifest), encoding="utf-8")


def card_text(manifest: Manifest) -> str:
    """The card as Markdown with Hugging Face front matter."""
    source, config, metrics = manifest.source, manifest.config, manifest.metrics
    front = ["---", *_front_matter(manifest), "---", ""]
    method = config["method"] or "an unknown method"
    known = config["method"] is not None
    calibration, error = manifest.calibration, metrics["mean_layer_error"]
    rows = {
        "base model": source.id + (f" @ {source.revision}" if source.revision else ""),
        "licence": source.license or "not stated by the base model; its terms apply",
        "method": f"{method} {_parameters(config['resolved_method'])}".rstrip(),
        "pattern": f"{config['pattern']} in {metrics['pruned_tensors']} linear layers",
        "zeros counted in those layers": f"{metrics['sparsity_of_pruned_tensors']:.4%}",
        "calibration": ("none" if known else "unknown")
        if calibration is None
        else f"{calibration['samples']} x {calibration['length']} tokens of {calibration['source']}",
        "mean relative layer error": "unknown" if error is None else f"{error:.4f}",
        "format": manifest.format,
        **_size_rows(metrics.get("size", {})),
        "made with": f"crepe-deploy {manifest.versions['crepe-deploy']}",
        **source.notes,
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    title = f"# {Path(source.id).name}, pruned to {config['pattern']} with {method}"
    closing = ["", _TRUTH.get(manifest.format, ""), "", "`manifest.json` holds every tensor's counts and hashes."]
    return "\n".join([*front, title, "", *table, *closing]) + "\n"


def _front_matter(manifest: Manifest) -> list[str]:
    lines = ["library_name: transformers", "tags: [pruned, sparse, crepe-deploy]"]
    if manifest.source.kind == "hub":
        lines.append(f"base_model: {manifest.source.id}")
    if manifest.source.license:
        lines.append(f"license: {manifest.source.license}")
    return lines


def _size_rows(size: dict[str, Any]) -> dict[str, str]:
    if "file_bytes_over_dense" not in size:
        return {}
    return {
        "bytes of the packed layers, over dense": f"{size['weight_bytes_over_dense']:.4f}",
        "bytes of all weight files, over dense": f"{size['file_bytes_over_dense']:.4f}",
    }


def _parameters(method: dict[str, object]) -> str:
    shown = ", ".join(f"{name}={value}" for name, value in method.items() if name != "class")
    return f"({shown})" if shown else ""
