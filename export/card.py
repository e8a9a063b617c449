"""The model card of an exported checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..store.files import disk_errors
from ..store.manifest import Manifest

CARD_NAME = "README.md"

_TRUTH = {
    "dense": (
        "The zeros are stored explicitly: every Hugging Face reader loads this folder unchanged, and none of them is "
        "smaller or faster for it. Export with `--format packed` for a smaller file."
    ),
    "packed": (
        "The pruned weights are stored without their zeros, in the format `crepe-nm`: smaller on disk and in memory. "
        "transformers (after `import crepe_deploy`) and vLLM (by itself, once crepe-deploy is installed) run it from "
        "the packed weights on CPUs and NVIDIA GPUs; no GPU speed has been measured, so none is claimed. Readers "
        "without crepe-deploy refuse it. `crepe-deploy export --format dense` gives the "
        "plain folder back, bit by bit."
    ),
    "onnx": (
        "An ONNX graph that was compared with its checkpoint, prefill and decoding. ONNX Runtime multiplies by stored "
        "zeros like by any other value, on CPU and CUDA: pruning made this folder neither smaller nor faster there. "
        "`manifest.json` says what the graph takes as padding, and for 2:4 which settings of TensorRT use the pattern."
    ),
    "int8": (
        "Weights and activations of the linear layers are rounded to 8 bits (W8A8: to nearest, one scale for each "
        "output channel, and for each token at run time; no calibration). Unmodified vLLM runs it with int8 kernels; "
        "transformers, with the compressed-tensors package, expands the weights at load and imitates the rounding of "
        "activations, so there it is no smaller and no faster. Zeros take a byte like every other value: pruning made "
        "this folder neither smaller nor faster."
    ),
    "uniform": (
        "Whole attention heads and feed-forward neurons were removed, the same number in every layer: an ordinary, "
        "smaller model that every Hugging Face reader and server loads, with nothing to install."
    ),
    "per-layer": (
        "Whole attention heads and feed-forward neurons were removed, each layer its own number. transformers (after "
        "`import crepe_deploy`) and vLLM (by itself, once crepe-deploy is installed) run it on their own layers; others"
        " refuse its model type. `crepe-deploy export --format deci` makes a folder for vLLM without crepe-deploy."
    ),
    "deci": (
        "Whole attention heads and feed-forward neurons were removed, each layer its own number, written in the DeciLM "
        "layout: `vllm serve DIR --trust-remote-code` (for the small configuration file beside the weights) serves it "
        "without crepe-deploy. Layers with fewer heads are padded with heads of zeros; transformers has no such model."
    ),
}


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write `README.md` from the manifest: base model, inherited licence, method, pattern and counted numbers."""
    with disk_errors(folder):
        (folder / CARD_NAME).write_text(card_text(manifest), encoding="utf-8")


def card_text(manifest: Manifest) -> str:
    """The card as Markdown with Hugging Face front matter."""
    source = manifest.source
    front = ["---", *_front_matter(manifest), "---", ""]
    rows = {
        "base model": source.id + (f" @ {source.revision}" if source.revision else ""),
        "licence": source.license or "not stated by the base model; its terms apply",
        **_pruning(manifest),
        "format": manifest.format,
        **_size_rows(manifest),
        "made with": f"crepe-deploy {manifest.versions['crepe-deploy']}",
        **source.notes,
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    title = f"# {', '.join([Path(source.id).name, *_done(manifest)])}"
    structural = manifest.config.get("structural", {})
    layout = structural.get("layout", "dense") if manifest.format == "dense" else manifest.format
    closing = ["", _TRUTH.get(layout, ""), "", "`manifest.json` holds every tensor's counts and hashes."]
    return "\n".join([*front, title, "", *table, *closing]) + "\n"


def _done(manifest: Manifest) -> list[str]:
    """What was done to the base model, for the title."""
    pattern, method = manifest.config["pattern"], manifest.config["method"] or "an unknown method"
    pruned = [f"pruned to {pattern} with {method}"] if manifest.tensors else []
    if "structural" in manifest.config:
        pruned = ["structurally pruned"]
    return [*pruned, *(["quantised to int8"] if manifest.format == "int8" else [])]


def _pruning(manifest: Manifest) -> dict[str, str]:
    if "structural" in manifest.config:
        return _structural_rows(manifest)
    return _pruning_rows(manifest) if manifest.tensors else {"pruning": "none"}


def _structural_rows(manifest: Manifest) -> dict[str, str]:
    structural, kept = manifest.config["structural"], manifest.metrics["parameters"]
    spans = [
        f"{min(column)} to {max(column)} of {whole}"
        for column, whole in zip(zip(*structural["layers"], strict=True), structural["dense"], strict=True)
    ]
    return {
        "method": str(manifest.config["method"]),
        "parameters of heads and neurons kept": f"{kept['kept']:.4%}",
        "query heads, KV heads, neurons in a layer": "; ".join(spans),
    }


def _pruning_rows(manifest: Manifest) -> dict[str, str]:
    config, metrics, calibration = manifest.config, manifest.metrics, manifest.calibration
    method, error = config["method"] or "an unknown method", metrics["mean_layer_error"]
    return {
        "method": f"{method} {_parameters(config['resolved_method'])}".rstrip(),
        **_step_rows(config),
        **({"logits scaled by": f"{metrics['rescale']['factor']:.4f}"} if "rescale" in metrics else {}),
        "pattern": f"{config['pattern']}{_mixed(metrics)} in {metrics['pruned_tensors']} linear layers",
        "zeros counted in those layers": f"{metrics['sparsity_of_pruned_tensors']:.4%}",
        "calibration": ("unknown" if config["method"] is None else "none")
        if calibration is None
        else f"{calibration['samples']} x {calibration['length']} tokens of {calibration['source']}",
        "mean relative layer error": "unknown" if error is None else f"{error:.4f}",
    }


def _step_rows(config: dict[str, Any]) -> dict[str, str]:
    """The steps around the method, by kind; manifests from before there were any have none."""
    steps = {kind: dict(step) for kind, step in config.get("resolved_steps", {}).items()}
    return {kind: f"{step.pop('class')} {_parameters(step)}".rstrip() for kind, step in steps.items()}


def _mixed(metrics: dict[str, Any]) -> str:
    return " on average" if len(metrics.get("patterns", ())) > 1 else ""


def _front_matter(manifest: Manifest) -> list[str]:
    tags = ["pruned", "sparse"] if manifest.tensors else ["pruned"] if "structural" in manifest.config else []
    tags = [*tags, *(["int8"] if manifest.format == "int8" else [])]
    lines = ["library_name: transformers", f"tags: [{', '.join([*tags, 'crepe-deploy'])}]"]
    if manifest.source.kind == "hub":
        lines.append(f"base_model: {manifest.source.id}")
    if manifest.source.license:
        lines.append(f"license: {manifest.source.license}")
    return lines


def _size_rows(manifest: Manifest) -> dict[str, str]:
    size: dict[str, Any] = manifest.metrics.get("size", {})
    if "file_bytes_over_dense" not in size:
        return {}
    layers = "quantised" if manifest.format == "int8" else "packed"
    if "structural" in manifest.config:
        layers = "decoder"
    return {
        f"bytes of the {layers} layers, over dense": f"{size['weight_bytes_over_dense']:.4f}",
        "bytes of all weight files, over dense": f"{size['file_bytes_over_dense']:.4f}",
    }


def _parameters(method: dict[str, object]) -> str:
    shown = ", ".join(f"{name}={value}" for name, value in method.items() if name != "class")
    return f"({shown})" if shown else ""
