"""The child process of the memory measurement: prune a folder with CRePE 2:4 and report resident memory as JSON.

python -m crepe_deploy.bench.studies.prune_child MODEL OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(model: str, out: str) -> dict[str, Any]:
    """Prune with random calibration tokens (speed and memory do not depend on their values)."""
    import torch
    from transformers.models.llama import modeling_llama

    from ...machine import peak_rss_bytes
    from ...pruning.config import prune_config
    from ...pruning.prune import prune
    from ...store.sources import resolve_model
    from ...texts import CalibrationSet

    assert modeling_llama is not None
    imported = peak_rss_bytes()
    tokens = torch.randint(32000, (16, 512), generator=torch.Generator().manual_seed(0))
    calibration = CalibrationSet(
        tokens=tokens,
        source="random",
        sha256="",
        field="",
        seed=0,
        text_tokens=tokens.numel(),
        rule="random",
        bos="none",
    )
    prune(resolve_model(model), Path(out), prune_config(), calibration)
    return {"import_bytes": imported, "peak_bytes": peak_rss_bytes()}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
