"""What `tyr` writes: OUT/dense/, the smaller checkpoint, and OUT/report.json; both appear or neither."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ..errors import ConfigError
from ..model.architecture import content_with_sizes, load_config
from ..store.checkpoint import read_config
from ..store.files import disk_errors, write_json
from ..store.folders import atomic_folder
from ..store.manifest import load_manifest
from ..store.sources import Model
from ..structural.layout import Widths, check_family
from ..structural.plan import Geometry
from ..structural.tyr import TyrResult
from .heal import Healing
from .structural.assemble import assemble, choose_layout

# Of the report: what the manifest holds under another name or not at all.
_ELSEWHERE = ("config", "calibration", "versions", "parameters")


@dataclass(frozen=True)
class FolderWriter:
    """Writes what `structural.tyr.tyr` found as a folder; the fields are as `assemble` has them.

    healing: what is done to the folder before it is given out. base_model: the hub id of the parent, for the card.
    """

    widths: str
    layout: str = "plugin"
    remote_code: bool = False
    healing: Healing | None = None
    base_model: str | None = None

    def check(self, model: Model) -> None:
        """Refuse what no widths could make fit. Raises ConfigError, UnsupportedModel."""
        if self.healing is not None and self.layout == "deci":
            raise ConfigError("--layout deci is not trained: heal with --layout plugin, and export that as deci")
        check_family(read_config(model.folder))
        config = load_config(model.folder)
        content, geometry = content_with_sizes(model.folder, config), Geometry.from_config(config)
        dense = [Widths(geometry.heads, geometry.kv_heads, geometry.intermediate)] * geometry.layers
        choose_layout(content, geometry, dense, self.widths, self.layout, self.remote_code)

    def __call__(self, result: TyrResult, out: Path, overwrite: bool) -> dict[str, Any]:
        """Write `out` and return what the report gains by it."""
        with atomic_folder(out, overwrite=overwrite) as folder:
            manifest = assemble(
                result.model, result.plans, folder / "dense", layout=self.layout, remote_code=self.remote_code,
                widths=cast(Literal["uniform", "per-layer"], self.widths), record=self._record(result),
                calibration=result.calibration.record(),
                metrics={name: value for name, value in result.report.items() if name not in _ELSEWHERE},
            )  # fmt: skip
            healed = {} if self.healing is None else {"healed": self._healed(folder / "dense", self.healing)}
            written = {
                **healed,
                "dense": {"path": str(out / "dense"), "size": manifest.metrics["size"]},
                "parity": manifest.metrics["parity"],
            }
            write_json(folder / "report.json", {**result.report, **written})
        return written

    @staticmethod
    def _healed(dense: Path, healing: Healing) -> dict[str, Any]:
        """Heal the folder in its place; what its manifest says of that."""
        healed = healing(dense)
        with disk_errors(dense):
            shutil.rmtree(dense)
            healed.rename(dense)
        found: dict[str, Any] = load_manifest(dense).config["healed"]
        return found

    def _record(self, result: TyrResult) -> dict[str, Any]:
        return asdict(result.config) | ({"base_model": self.base_model} if self.base_model else {})
