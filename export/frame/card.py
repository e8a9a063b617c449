"""The model card of an exported checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ...errors import VerifyError
from ...project import install_address, project_url
from ...store.files import disk_errors
from ...store.manifest import Manifest
from .exporter import Words

CARD_NAME = "README.md"


def write_card(folder: Path, manifest: Manifest, words: Words) -> None:
    """Write `README.md` from the manifest: base model, inherited licence, method, pattern and counted numbers."""
    with disk_errors(folder):
        (folder / CARD_NAME).write_text(card_text(manifest, words), encoding="utf-8")


def check_record(manifest: Manifest) -> None:
    """Raise VerifyError where a manifest, edited by hand, lacks what its card would say."""
    try:
        card_text(manifest, Words(""))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise VerifyError(
            f"manifest.json is not as crepe-deploy wrote it: {type(error).__name__} {error}; take the folder as it was "
            "written, or prune again"
        ) from error


def card_text(manifest: Manifest, words: Words) -> str:
    """The card as Markdown with Hugging Face front matter."""
    source = manifest.source
    front = ["---", _front_matter(manifest, words) + "---", ""]
    rows = {
        "base model": (base_model(manifest) or Path(source.id).name)
        + (f" @ {source.revision}" if source.revision else ""),
        "licence": source.license or "not stated by the base model; its terms apply",
        **_pruning(manifest),
        **_healing(manifest.config.get("healed")),
        "format": manifest.format,
        **_size_rows(manifest, words),
        "made with": f"crepe-deploy {manifest.versions['crepe-deploy']}",
        **source.notes,
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    title = f"# {', '.join([Path(base_model(manifest) or source.id).name, *_done(manifest, words)])}"
    closing = ["", words.truth, "", *_use(words), "`manifest.json` holds every tensor's counts and hashes."]
    return "\n".join([*front, title, "", *table, *closing, "", _links()]) + "\n"


def base_model(manifest: Manifest) -> str | None:
    """The hub id of the parent: as given by `--base-model`, or where the model was fetched from."""
    given: str | None = manifest.config.get("base_model")
    return given or (manifest.source.id if manifest.source.kind == "hub" else None)


def _use(words: Words) -> list[str]:
    if not words.use:
        return []
    address = install_address()
    text = words.use.replace("INSTALL_ONNX", f"crepe-deploy[onnx] @ {address}")
    text = text.replace("INSTALL", f"crepe-deploy @ {address}")
    return ["## How to load and serve", "", "`MODEL` is this folder, or its id on the hub.", "", text, ""]


def _links() -> str:
    labels = ("Repository", "Documentation", "Issues")
    return "crepe-deploy: " + ", ".join(f"[{label.lower()}]({project_url(label)})" for label in labels)


def _done(manifest: Manifest, words: Words) -> list[str]:
    """What was done to the base model, for the title."""
    pattern, method = manifest.config["pattern"], manifest.config["method"] or "an unknown method"
    pruned = [f"pruned to {pattern} with {method}"] if manifest.tensors else []
    if "structural" in manifest.config:
        pruned = ["structurally pruned"]
    if "experts" in manifest.config:
        pruned = [f"{manifest.config['experts']['kept']} of {manifest.config['experts']['before']} experts"]
    pruned += ["healed"] if "healed" in manifest.config else []
    return [*pruned, *([words.done] if words.done else [])]


def _pruning(manifest: Manifest) -> dict[str, str]:
    if "structural" in manifest.config:
        return _structural_rows(manifest)
    if "experts" in manifest.config:
        return _expert_rows(manifest)
    return _pruning_rows(manifest) if manifest.tensors else {"pruning": "none"}


def _healing(healed: dict[str, Any] | None) -> dict[str, str]:
    """What was trained on what, where the model was trained after pruning."""
    if healed is None:
        return {}
    texts, kl = ", ".join(Path(text["source"]).name for text in healed["texts"]), healed["held_out_kl"]
    return {
        "trained": f"healed towards the dense model's logits, zeros held: {healed['steps']} steps, "
        f"{healed['tokens']:,} tokens, {healed['seconds']:.0f} s",
        "trained on the text of": texts,
        "held-out KL to the dense model (lower is better)": f"{kl['before']:.4f} before, {kl['after']:.4f} after",
    }


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


def _expert_rows(manifest: Manifest) -> dict[str, str]:
    experts, sizes, used = (
        manifest.config["experts"], manifest.metrics["parameters"], manifest.metrics["effective_experts"]
    )  # fmt: skip
    whole = {"multi-token prediction": "left as it was, for all experts: serve without it"}
    return {
        "method": str(manifest.config["method"]),
        "experts in a layer": f"{experts['kept']} of {experts['before']}, {experts['per_token']} for a token",
        "parameters": f"{sizes['after']['held']:,} of {sizes['before']['held']:,} held, {sizes['after']['active']:,} "
        "active for a token",
        "experts used as if evenly, in a layer": f"{used['before']:.1f} before, {used['after']:.1f} after",
        "calibration": _calibration(manifest.calibration),
        **(whole if experts["left_whole"] else {}),
    }


def _calibration(calibration: dict[str, Any] | None, without: str = "none") -> str:
    if calibration is None:
        return without
    return f"{calibration['samples']} x {calibration['length']} tokens of {calibration['source']}"


def _pruning_rows(manifest: Manifest) -> dict[str, str]:
    config, metrics = manifest.config, manifest.metrics
    method, error = config["method"] or "an unknown method", metrics["mean_layer_error"]
    return {
        "method": f"{method} {_parameters(config['resolved_method'])}".rstrip(),
        **_step_rows(config),
        **({"logits scaled by": f"{metrics['rescale']['factor']:.4f}"} if "rescale" in metrics else {}),
        "pattern": f"{config['pattern']}{_mixed(metrics)} in {metrics['pruned_tensors']} linear layers",
        "zeros counted in those layers": f"{metrics['sparsity_of_pruned_tensors']:.4%}",
        "calibration": _calibration(manifest.calibration, "unknown" if config["method"] is None else "none"),
        "mean relative layer error (lower is better)": "unknown" if error is None else f"{error:.4f}",
    }


def _step_rows(config: dict[str, Any]) -> dict[str, str]:
    """The steps around the method, by kind; manifests from before there were any have none."""
    steps = {kind: dict(step) for kind, step in config.get("resolved_steps", {}).items()}
    return {kind: f"{step.pop('class')} {_parameters(step)}".rstrip() for kind, step in steps.items()}


def _mixed(metrics: dict[str, Any]) -> str:
    return " on average" if len(metrics.get("patterns", ())) > 1 else ""


def _front_matter(manifest: Manifest, words: Words) -> str:
    smaller = {"structural", "experts"} & manifest.config.keys()
    tags = ["pruned", "sparse"] if manifest.tensors else ["pruned"] if smaller else []
    content: dict[str, Any] = {
        "library_name": words.library,
        "pipeline_tag": "text-generation",
        "tags": [*tags, *words.tags, "crepe-deploy"],
    }
    if parent := base_model(manifest):
        content["base_model"] = parent
    if manifest.source.license:
        names = manifest.source.license.split(", ")
        content["license"] = names if len(names) > 1 else names[0]
    return str(yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True))


def _size_rows(manifest: Manifest, words: Words) -> dict[str, str]:
    size: dict[str, Any] = manifest.metrics.get("size", {})
    if "file_bytes_over_dense" not in size:
        return {}
    layers = "decoder" if "structural" in manifest.config else words.layers
    return {
        f"bytes of the {layers} layers, over dense (lower is better)": f"{size['weight_bytes_over_dense']:.4f}",
        "bytes of all weight files, over dense (lower is better)": f"{size['file_bytes_over_dense']:.4f}",
    }


def _parameters(method: dict[str, object]) -> str:
    shown = ", ".join(f"{name}={value}" for name, value in method.items() if name != "class")
    return f"({shown})" if shown else ""
