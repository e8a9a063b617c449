"""`search`: CRePE's hyperparameters for one model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from crepe_deploy.device import chosen
from crepe_deploy.errors import ConfigError
from crepe_deploy.pattern import Pattern
from crepe_deploy.progress import Later, Say, Show
from crepe_deploy.searching.run import SearchConfig, check_options
from crepe_deploy.searching.run import search as search_preset
from crepe_deploy.searching.space import KERNEL_SIZES

from .inputs import Calibration, Granularity, check_calibration, find_model, pattern_of, windows_of


def search(
    model: str | Path, out: str | Path, *, calib: Calibration, text: Calibration,
    sparsity: Pattern | str | float = "2:4", granularity: Granularity = "row", calib_field: str = "text",
    calib_samples: int = 16, calib_length: int = 512,
    text_field: str = "text", text_samples: int = 4, text_length: int = 512,
    optimizer: Literal["pho", "hill-climb"] = "pho", proxy: str = "auto", evaluations: int | None = None,
    minutes: float | None = None, fit: int = 16, finalists: int = 8, kernels: Sequence[int] = KERNEL_SIZES,
    seed: int = 0, workers: int = 2, include: str | None = None, exclude: str | None = None, dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None, resume: bool = False, overwrite: bool = False, show: Show | None = None,
    say: Say | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Find CRePE's hyperparameters for `model` and write them to the file `out`, a preset; returns its document.

    model, calib, sparsity, granularity, calib_*, include, exclude, dtype, device, revision: as in `prune`. text: what
    masks are judged on, given as `calib` is; never a test split. optimizer: "pho", proxies filter and KL to the dense
    model decides, or "hill-climb", the slow baseline. evaluations: None is 240 or 60. minutes: of wall clock. fit,
    finalists: settings judged before and after the filter. kernels: window sizes, odd, ascending. workers: threads.
    resume: go on with OUT.journal, which a stopped search leaves; on the command line that is exit code 75.
    show: wraps a label for each long step and yields its progress. say: told stages and each new best.
    Raises ConfigError, OutputError, PatternError, CalibrationError, MissingExtra (exit code 2), NumericalError (1).
    Source: CRePE and PHO, docs/crepe.md.
    """
    if isinstance(text, str | Path):
        refuse_test_split(str(text))
    config = SearchConfig(
        pattern_of(sparsity, granularity), optimizer=optimizer, proxy=proxy, evaluations=evaluations, minutes=minutes,
        fit=fit, finalists=finalists, kernel_sizes=tuple(kernels), seed=seed, workers=workers, include=include,
        exclude=exclude, dtype=dtype,
    )  # fmt: skip
    check_options(Path(out), config, overwrite=overwrite)
    check_calibration(text, calib)
    later = Later(say)
    shown, place = later.show(show), chosen(device, later)
    source = find_model(model, revision, say)
    judged_on = windows_of(source, text, text_field, text_samples, text_length, seed, later, shown, place)
    calibration = windows_of(source, calib, calib_field, calib_samples, calib_length, seed, later, shown, place)
    return search_preset(
        source, Path(out), config, calibration, judged_on, resume=resume, overwrite=overwrite,
        show=shown, say=later, device=place,
    )  # fmt: skip


def refuse_test_split(source: str) -> None:
    """Raise ConfigError for a text whose file name or split says that it is a test split."""
    name = Path(source).name if Path(source).is_file() else source.partition(":")[2]
    if "test" in re.split(r"[^a-z0-9]+", name.lower()):
        raise ConfigError(f"--text {source} is called a test split: search on a validation or training text")
