"""What `tyr` writes: OUT/dense/, the smaller checkpoint, and OUT/report.json; both appear or neither."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

from ..errors import ConfigError
from ..structural.tyr import Outcome
from ..writing import atomic_folder, write_json
from .structural import LAYOUTS, assemble

# Of the report: what the manifest holds under another name or not at all.
_ELSEWHERE = ("config", "calibration", "versions", "parameters")


def writer(widths: str, layout: str, remote_code: bool) -> Callable[..., dict[str, Any]]:
    """What `structural.tyr.tyr` calls with an outcome and a folder. Raises ConfigError for what does not fit."""
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout '{layout}' is unknown; known: {', '.join(LAYOUTS)}")
    if widths == "uniform" and (layout != "plugin" or remote_code):
        raise ConfigError("uniform widths are a plain checkpoint, with neither --layout deci nor --remote-code")

    def write(outcome: Outcome, out: Path, overwrite: bool) -> dict[str, Any]:
        widths = cast(Literal["uniform", "per-layer"], outcome.config.widths)
        with atomic_folder(out, overwrite=overwrite) as folder:
            manifest = assemble(
                outcome.model, outcome.plans, folder / "dense", widths=widths, layout=layout, remote_code=remote_code,
                record=asdict(outcome.config), calibration=outcome.calibration.record(),
                metrics={name: value for name, value in outcome.report.items() if name not in _ELSEWHERE},
            )  # fmt: skip
            written = {
                "dense": {"path": str(out / "dense"), "size": manifest.metrics["size"]},
                "parity": manifest.metrics["parity"],
            }
            write_json(folder / "report.json", {**outcome.report, **written})
        return written

    return write
