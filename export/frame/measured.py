"""Measured quality in a model card: a section between two marks that `eval --update-card` writes and refreshes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...errors import CheckpointError, OutputError
from ...quality.scoring import better
from ...store.checkpoint import require_inside
from ...store.files import write_text
from ...store.manifest import load_manifest, save_manifest, sha256_file, versions
from ...store.reading import read_text
from .card import CARD_NAME

BEGIN: Final = "<!-- crepe-deploy eval: begin -->"
END: Final = "<!-- crepe-deploy eval: end -->"
_NAMES: Final = {
    "perplexity_ratio": "perplexity over it (lower is better)",
    "kl_mean": "mean KL divergence from it, nats (lower is better)",
    "kl_p99": "99th percentile of that KL divergence (lower is better)",
    "same_top": "same most likely token (higher is better)",
}


def check_card(folder: Path) -> None:
    """Refuse, before anything is measured, a card that cannot be refreshed. Raises CheckpointError, OutputError."""
    card = folder / CARD_NAME
    if CARD_NAME not in load_manifest(folder).files or not card.is_file():
        raise CheckpointError(
            f"{folder} has no model card of ours: `crepe-deploy export` writes one beside the weights"
        )
    require_inside(folder, card)
    _with_section(read_text(card, CheckpointError), "", card)
    if not (os.access(card, os.W_OK) and os.access(folder, os.W_OK)):
        raise OutputError(f"{card} cannot be written")


def update_card(folder: Path, measured: Mapping[str, Any]) -> None:
    """Write what `eval` measured into the card of `folder`, and the card's new hash into its manifest.

    What else stands in the card stays, a user's own words included. Raises CheckpointError, OutputError, DiskFullError.
    """
    card = folder / CARD_NAME
    section = "\n".join([BEGIN, "## Measured quality", "", *_rows(measured), END])
    write_text(card, _with_section(read_text(card, CheckpointError), section, card))
    manifest = load_manifest(folder)
    files = {**manifest.files, CARD_NAME: sha256_file(card)}
    save_manifest(folder, manifest.model_copy(update={"files": files}))


def _with_section(text: str, section: str, card: Path) -> str:
    if text.count(BEGIN) != text.count(END) or text.count(BEGIN) > 1:
        raise CheckpointError(
            f"{card} must have the marks {BEGIN} and {END} once each, or neither: mend or remove them"
        )
    if BEGIN not in text:
        return f"{text.rstrip()}\n\n{section}\n"
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: section, text, flags=re.DOTALL)


def _rows(measured: Mapping[str, Any]) -> list[str]:
    """A table of figures with 95 % intervals, and the conditions below it."""
    rows: dict[str, str] = {}
    below = [f"Measured with crepe-deploy {versions()['crepe-deploy']}; intervals are 95 % bootstraps."]
    if "perplexity" in measured:
        rows["perplexity (lower is better)"] = _figure(measured["perplexity"])
        asked = measured["convention"]
        below.append(
            f"Text: {_cell(Path(asked['text']).name)} (sha256 {asked['sha256'][:16]}), {asked['predicted']} predicted "
            f"tokens in {asked['windows']} windows of {asked['window']}, stride {asked['stride']}, BOS {asked['bos']}, "
            f"{asked['dtype']} on {asked['device']}."
        )
    if paired := measured.get("paired"):
        rows |= {title: _figure(paired[name]) for name, title in _NAMES.items()}
        below.append(f"Compared on the same tokens with {_cell(Path(paired['reference']).name)}.")
    if answers := measured.get("tasks"):
        for name, task in answers["tasks"].items():
            for metric, found in task["metrics"].items():
                error = "" if found["stderr"] is None else f" (standard error {found['stderr']:.2g})"
                title = f"{_cell(name)}, {metric}, {task['documents']} documents ({better(metric)} is better)"
                rows[title] = f"{found['value']:.4g}{error}"
        below.append(f"Tasks: lm-eval {answers['lm_eval']}, {answers['few_shot']} examples shown, {answers['dtype']}.")
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return [*table, "", *below]


def _figure(estimate: Mapping[str, Any]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"


def _cell(text: str) -> str:
    """Markdown that stays in its cell."""
    return " ".join(re.sub(r"[|<>`\[\]\\]", " ", text).split())
