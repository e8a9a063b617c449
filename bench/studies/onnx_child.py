"""The child process of the ONNX memory measurement: `python -m crepe_deploy.bench.studies.onnx_child MODEL OUT`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any


def main(model: str, out: str) -> dict[str, Any]:
    """Export a portable fp32 graph, proof included; the output is removed."""
    from ...exporting.pipeline import export_checkpoint
    from ...machine import peak_rss_bytes

    imported = peak_rss_bytes()
    peaks: list[int] = []
    manifest = export_checkpoint(
        Path(model), Path(out), "onnx", overwrite=True, step=lambda done, total: peaks.append(peak_rss_bytes())
    )
    shutil.rmtree(out)
    return {
        "import_bytes": imported,
        "peak_bytes": peak_rss_bytes(),
        "peaks_after": dict(zip(("graph", "checks", "zeros", "parity", "greedy"), peaks, strict=False)),
        "graph_bytes": manifest.metrics["size"]["graph_bytes"],
        "parity": manifest.metrics["onnx"]["parity"],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
