"""One vLLM with the plugin and one without it, each started once for all tests that ask something of one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.once import once
from tests.serve.models import OTHERS, exports, narrowed, per_layer
from tests.serve.vllm_process import WITHOUT_US, Answers, ask_vllm, generation

UNITS = Path(__file__).with_name("vllm_units.py")
NARROW_TOKENS = 32


@dataclass(frozen=True)
class Vllm:
    """Checkpoints by name, and what vLLM said of them with the plugin and without."""

    folders: dict[str, Path]
    plugin: Answers
    stock: Answers


@pytest.fixture(scope="session")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Vllm:
    """Asked once for the whole run, by whichever worker needs it first."""
    record = once(tmp_path_factory, "vllm", _ask)
    folders = {name: Path(folder) for name, folder in record["folders"].items()}
    return Vllm(folders, Answers(**record["plugin"]), Answers(**record["stock"]))


def _ask(root: Path) -> dict[str, Any]:
    import torch

    even = exports(root / "even", "2:4", torch.float32)
    uneven = exports(root / "uneven", "16:32", torch.float32, allocate="alpha:spread=0.5")
    narrow = narrowed(root / "narrow")
    others = {family: per_layer(root / family, family) for family in OTHERS}
    plugin = ask_vllm(
        [
            {"name": "units", "script": str(UNITS)},
            generation("2:4", even["packed"]),
            generation("patterns of their own", uneven["packed"]),
            generation("per-layer", narrow["per-layer"], NARROW_TOKENS),
            *(generation(family, folder, NARROW_TOKENS) for family, folder in others.items()),
        ]
    )
    stock = ask_vllm(
        [
            {"name": "packed", "refuse": str(even["packed"])},
            {"name": "per-layer", "refuse": str(narrow["per-layer"])},
            generation("deci", narrow["deci"], NARROW_TOKENS, trust_remote_code=True),
        ],
        **WITHOUT_US,
    )
    folders = {f"even {name}": folder for name, folder in even.items()}
    folders |= {f"uneven {name}": folder for name, folder in uneven.items()} | narrow | others
    return {
        "folders": {name: str(folder) for name, folder in folders.items()},
        "plugin": asdict(plugin),
        "stock": asdict(stock),
    }
