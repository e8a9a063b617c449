"""Structural pruning on another device, on a stand-in for a GPU (see `tests.stand_in`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from crepe_deploy.api.tyr import tyr
from tests.pico import make_pico_llama, sample_text
from tests.stand_in import NAME, stand_in


@pytest.mark.parametrize(
    "options",
    [
        {"fitness": "hidden", "finish": "paired", "attention": "groups"},
        {"fitness": "logits", "finish": "supernet", "attention": "queries"},
        {"widths": "uniform", "accumulation": "none"},
        {"method": "flap"},
        {"method": "random"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_same_smaller_model(tmp_path: Path, options: dict[str, str]) -> None:
    model, text = make_pico_llama(tmp_path / "m"), tmp_path / "text.txt"
    text.write_text(sample_text(3000), encoding="utf-8")

    def run(out: Path, device: str) -> dict[str, object]:
        tyr(
            model, out, calib=str(text), calib_samples=4, calib_length=32, sparsity=0.25, iterations=1, generations=1,
            offspring=2, ffn_multiple=8, device=device, **options,
        )  # fmt: skip
        return dict(load_file(out / "dense" / "model.safetensors"))

    expected = run(tmp_path / "cpu", "cpu")
    with stand_in():
        found = run(tmp_path / "device", NAME)
    assert found.keys() == expected.keys()
    assert all(bool((found[name] == expected[name]).all()) for name in expected)
