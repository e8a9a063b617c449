"""Quality of a candidate, measured in a process of its own, for each kind of folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from crepe_deploy.bench.run.quality import measure_quality, quality_of
from crepe_deploy.exporting.pipeline import prune_and_export

from crepe_deploy.errors import CrepeError
from crepe_deploy.pruning.config import prune_config
from crepe_deploy.quality.perplexity import evaluate
from crepe_deploy.store.sources import resolve_model
from tests.pico import make_pico_llama, sample_text

FORMATS = ["dense", "packed"] + (["int8"] if importlib.util.find_spec("compressed_tensors") else [])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quality")
    (root / "text.txt").write_text(sample_text(600))
    model = resolve_model(str(make_pico_llama(root / "model", torch.bfloat16)))
    config = prune_config("magnitude", "16:32")
    prune_and_export(model, root / "out", config, None, formats=FORMATS)
    return root


def test_the_child_measures_what_evaluate_does(folders: Path) -> None:
    text, folder, baseline = folders / "text.txt", folders / "out" / "dense", folders / "model"
    options: dict[str, Any] = {"window": 64, "stride": 32, "max_tokens": 256, "dtype": "float32", "seed": 3}
    measured = measure_quality(folder, baseline, text, **options)
    report = evaluate(folder, text, against=baseline, **options)
    assert measured == quality_of(report.to_dict())
    assert measured.convention["windows"] == 7 and measured.convention["dtype"] == "float32"
    assert measured.kl_mean is not None and measured.kl_mean.value > 0.1
    assert report.paired is not None and measured.kl_mean.value == report.paired.kl_mean.value


def test_every_format_has_a_quality(folders: Path) -> None:
    text = folders / "text.txt"
    qualities = {
        name: measure_quality(folders / "out" / name, folders / "out" / "dense", text, window=64, max_tokens=256)
        for name in FORMATS
    }
    assert qualities["dense"].kl_mean is not None and qualities["dense"].kl_mean.value == 0
    limits = {"packed": (0.0, 1e-3), "int8": (1e-6, 0.05)}  # kernels may round as the dense product does; int8 may not
    for name in FORMATS[1:]:
        distance = qualities[name]
        assert distance.convention == qualities["dense"].convention
        assert distance.kl_mean is not None and distance.perplexity_ratio is not None
        assert limits[name][0] <= distance.kl_mean.value <= limits[name][1], name
        assert distance.perplexity_ratio.value == pytest.approx(1, abs=0.05), name


def test_without_a_baseline_there_is_no_distance() -> None:
    interval = {"value": 2.0, "low": None, "high": None}
    quality = quality_of({"convention": {"window": 8}, "perplexity": interval, "paired": None})
    assert quality.perplexity.value == 2.0 and quality.kl_mean is None and quality.same_top is None


def test_a_failed_evaluation_is_an_error(folders: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CrepeError, match="exit code 2"):
        measure_quality(folders / "missing", None, folders / "text.txt", window=64)
    assert "missing" in capfd.readouterr().err
