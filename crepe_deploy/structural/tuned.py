"""What repair made of each narrowed layer, on disk: FOLDER/layer-0007.safetensors, done once the journal says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crepe_deploy.errors import VerifyError
from crepe_deploy.pruning.steps.repair import Repaired, is_repaired
from crepe_deploy.store.files import disk_errors
from crepe_deploy.store.journal import Journal
from crepe_deploy.store.manifest import sha256_file

KIND = "repair"  # of the journal's lines


@dataclass(frozen=True)
class TunedLayers:
    """The layers of a run that were repaired, in `folder`."""

    folder: Path
    journal: Journal

    def find(self, index: int) -> Repaired | None:
        """How it went with a layer; None where it is to be repaired, or again for its file is missing or damaged."""
        entry, path = self.journal.get(KIND, str(index), _is_entry), self._path(index)
        if entry is None or not path.is_file() or sha256_file(path) != entry["sha256"]:
            return None
        return Repaired(entry["before"], entry["after"], entry["step"])

    def write(self, index: int, tensors: Mapping[str, Tensor], result: Repaired) -> None:
        """Write a layer, and then its line. Raises DiskFullError, OutputError."""
        path = self._path(index)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), str(path))
        self.journal.add(KIND, str(index), {**asdict(result), "sha256": sha256_file(path)})

    def load(self, index: int) -> dict[str, Tensor]:
        """Tensors by their names in the layer. Raises VerifyError naming a damaged file and how to make it anew."""
        path = self._path(index)
        try:
            if self.find(index) is None:
                raise VerifyError(f"{path} is not what was written")
            tensors: dict[str, Tensor] = load_file(str(path))
        except (VerifyError, SafetensorError, OSError) as error:
            raise VerifyError(f"{error}: the same command with --resume repairs this layer again") from error
        return tensors

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:04d}.safetensors"


def _is_entry(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("sha256"), str):
        return False
    return is_repaired({name: entry for name, entry in value.items() if name != "sha256"})
