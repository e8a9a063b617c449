"""A search from a model folder to a preset file: refuse early, search, lose to no anchor, say how it was found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from crepe_deploy.device import CPU, described
from crepe_deploy.errors import ConfigError, OutputError
from crepe_deploy.model.decoder import Decoder, LinearSpec, check_dtype
from crepe_deploy.nearest import unknown
from crepe_deploy.pattern import Pattern
from crepe_deploy.progress import Say, Show, hidden, unsaid
from crepe_deploy.pruning.recipe import Preset
from crepe_deploy.pruning.targets import choose_targets
from crepe_deploy.store.files import check_output_file, write_json
from crepe_deploy.store.folders import held
from crepe_deploy.store.journal import open_journal
from crepe_deploy.store.manifest import versions
from crepe_deploy.store.sources import Model, describe_source
from crepe_deploy.store.temporary import temporary_folder
from crepe_deploy.texts import CalibrationSet

from .evaluate import Evaluator
from .hill_climb import hill_climb
from .hybrid import SAMPLER, SearchResult, correlations, pho
from .kinds import walk
from .losses import Losses
from .optimise import Expired, require_cmaes
from .proxies import check_proxy
from .space import KERNEL_SIZES, Setting, Space, anchors
from .statistics import SampleRule

EVALUATIONS = {"pho": 240, "hill-climb": 60, "kinds": 60}


@dataclass(frozen=True)
class SearchConfig:
    """Everything that decides the result, besides the model and the two token sets.

    evaluations: of the optimiser; None is `EVALUATIONS`. minutes: of wall clock, from the start or the resumption.
    fit, finalists: settings that PHO judges before and after its filter.
    """

    pattern: Pattern
    optimizer: Literal["pho", "hill-climb", "kinds"] = "pho"
    proxy: str = "auto"
    evaluations: int | None = None
    minutes: float | None = None
    fit: int = 16
    finalists: int = 8
    kernel_sizes: tuple[int, ...] = KERNEL_SIZES
    seed: int = 0
    workers: int = 2
    include: str | None = None
    exclude: str | None = None
    dtype: str = "auto"


@dataclass
class _Search:
    config: SearchConfig
    space: Space
    evaluator: Evaluator
    started: float
    say: Say

    def expired(self, still_to_judge: int) -> Expired:
        """Whether the time is up but for what judging so many settings will take."""
        limit = math.inf if self.config.minutes is None else 60 * self.config.minutes

        def check() -> bool:
            reserve = still_to_judge * self.evaluator.seconds_a_setting
            return time.monotonic() - self.started + reserve > limit

        return check


def journal_path(out: Path) -> Path:
    """Where the journal of a search for the preset `out` lies. Raises OutputError where `out` has no name."""
    if not out.name:
        raise OutputError(f"{out} is a folder: give the name of a file")
    return out.with_name(out.name + ".journal")


def search(
    model: Model,
    out: Path,
    config: SearchConfig,
    calibration: CalibrationSet,
    text: CalibrationSet,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show: Show = hidden,
    say: Say = unsaid,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Search CRePE's hyperparameters for `model` and write the preset `out`; returns its document.

    calibration: what the masks are made from, as for `prune`. text: what they are judged on; not a test split.
    The journal beside `out` keeps every evaluation; with `resume` a stopped search goes on to the same result.
    show: wraps the long steps in a progress display. say: receives a line for each stage and each new best.
    device: that runs the model; proxies, which see a few rows of each layer, stay on the host's threads.
    Raises ConfigError, OutputError, PatternError, MissingExtra before any work, NumericalError, DiskFullError.
    """
    started = time.monotonic()
    decoder, targets, space = _prepare(model, out, config, calibration, text, overwrite, device)
    identity = _identity(model, config, calibration, text)
    rule = SampleRule(reach=space.kernel_sizes[-1] // 2, seed=config.seed)
    with held(out), temporary_folder("search") as folder:
        journal = open_journal(journal_path(out), identity, resume=resume, overwrite=overwrite)
        evaluator = Evaluator(
            decoder, targets, config.pattern, calibration, text, rule, journal, folder, config.workers, show
        )
        run = _Search(config, space, evaluator, started, say)
        result = OPTIMIZERS[config.optimizer](run)
        document = _document(out, run, identity, result)
        Preset.model_validate(document)  # what cannot be used is not written
        write_json(out, document)
    return document


def _prepare(
    model: Model, out: Path, config: SearchConfig, calibration: CalibrationSet, text: CalibrationSet, overwrite: bool,
    device: torch.device,
) -> tuple[Decoder, list[list[LinearSpec]], Space]:  # fmt: skip
    """Everything that can be refused is refused here."""
    check_options(out, config, overwrite=overwrite)
    decoder = Decoder(model.folder, config.dtype, device)
    targets = choose_targets(decoder, config.pattern, config.include, config.exclude)
    for name, tokens in (("calibration", calibration.tokens), ("search", text.tokens)):
        if tokens.shape[1] > decoder.context_length:
            raise ConfigError(
                f"{name} windows of {tokens.shape[1]} tokens exceed the model's context of {decoder.context_length}"
            )
    if config.optimizer == "kinds" and len(text.tokens) < 2:
        raise ConfigError("--optimizer kinds compares two halves of the search text: give 2 --text-samples or more")
    shortest = min(min(spec.in_features, spec.out_features) for block in targets for spec in block)
    return decoder, targets, Space(config.kernel_sizes, shortest)


def check_options(out: Path, config: SearchConfig, *, overwrite: bool) -> None:
    """Refuse what needs no model to be judged. Raises OutputError, ConfigError, MissingExtra."""
    if out.suffix != ".json":
        raise OutputError(f"--out {out}: a preset is a .json file")
    check_output_file(out, overwrite=overwrite)
    if not out.absolute().parent.is_dir():
        raise OutputError(f"{out} cannot be written: its folder does not exist")
    if config.optimizer not in EVALUATIONS:
        raise ConfigError(unknown("optimizer", config.optimizer, EVALUATIONS))
    check_proxy(config.proxy)
    if config.optimizer == "pho":
        require_cmaes()
    check_dtype(config.dtype)


def _identity(model: Model, config: SearchConfig, calibration: CalibrationSet, text: CalibrationSet) -> dict[str, Any]:
    """What a journal must agree on to be resumed; budgets and threads may differ."""
    free = ("evaluations", "minutes", "workers", "pattern", "kernel_sizes")
    return {
        "source": describe_source(model).model_dump(mode="json"),
        "calibration": calibration.record(),
        "search_text": text.record(),
        "pattern": str(config.pattern),
        "kernel_sizes": list(config.kernel_sizes),
        "sampler": SAMPLER,  # a seed draws other settings with another
        **{name: value for name, value in asdict(config).items() if name not in free},
    }


def _budget(config: SearchConfig) -> int:
    return config.evaluations if config.evaluations is not None else EVALUATIONS[config.optimizer]


def _report(say: Say, what: str, total: int) -> Callable[[int, Setting, float], None]:
    def report(asked: int, best: Setting, value: float) -> None:
        say(f"{asked}/{total} evaluations, best {what} so far {value:.5g}: {_describe(best)}")

    return report


def _pho(run: _Search) -> SearchResult:
    config = run.config
    return pho(
        run.space,
        run.evaluator,
        proxy=config.proxy,
        fit=config.fit,
        finalists=config.finalists,
        evaluations=_budget(config),
        seed=config.seed,
        expired=run.expired,
        say=run.say,
        report=_report(run.say, "proxy", _budget(config)),
    )


def _climb(run: _Search) -> SearchResult:
    judged: dict[str, tuple[Setting, Losses]] = {}

    def perplexity(settings: list[Setting]) -> list[float]:
        losses = run.evaluator.losses(settings)
        judged.update({setting.key: (setting, own) for setting, own in zip(settings, losses, strict=True)})
        return [math.exp(own.mean_nll) for own in losses]

    known = list(anchors().values())
    perplexity(known)
    budget = _budget(run.config)
    report = _report(run.say, "perplexity", budget)
    ranking = hill_climb(run.space, known[0], perplexity, evaluations=budget, expired=run.expired(0), report=report)
    return SearchResult(list(judged.values()), len(ranking.ranked), [])


def _kinds(run: _Search) -> SearchResult:
    return walk(run.evaluator, evaluations=_budget(run.config), expired=run.expired(0), say=run.say)


OPTIMIZERS: dict[str, Callable[[_Search], SearchResult]] = {"pho": _pho, "hill-climb": _climb, "kinds": _kinds}


def _document(out: Path, run: _Search, identity: dict[str, Any], result: SearchResult) -> dict[str, Any]:
    """The preset: what was chosen, else the judged setting with the least KL (PHO) or perplexity (hill climbing).

    With how it was found; the proxies know no kinds of layers and no means.
    """
    by_kl = run.config.optimizer == "pho"
    known = {judged.key: own for judged, own in result.judged}
    setting = result.chosen or min(result.judged, key=lambda pair: pair[1].mean_kl if by_kl else pair[1].mean_nll)[0]
    proxies = (
        {}
        if run.config.optimizer == "kinds"
        else {
            "filters": [asdict(chosen) for chosen in result.filters],
            "spearman_with_kl": correlations(run.evaluator, result.judged),
            "proxies": run.evaluator.proxies([setting])[0],
            "proxy_standard_errors": run.evaluator.errors(setting),
            "sample": asdict(run.evaluator.rule),
        }
    )
    provenance = {
        **identity,
        "evaluations": result.evaluations,
        "judged": len(result.judged),
        "result": _figures(known[setting.key]),
        "anchors": {name: _figures(known[anchor.key]) for name, anchor in anchors().items()},
        **proxies,
        "device": described(run.evaluator.decoder.device),
        "seconds": round(time.monotonic() - run.started, 1),
        "versions": versions(),
    }
    params = {name: value for name, value in vars(setting.build()).items() if name in setting.params}
    kinds = {"kinds": setting.kinds} if setting.kinds else {}
    return {"name": out.stem, "method": setting.method, "params": params, **kinds, "provenance": provenance}


def _figures(losses: Losses) -> dict[str, float]:
    return {"kl": losses.mean_kl, "perplexity": math.exp(losses.mean_nll)}


def _describe(setting: Setting) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.params.items() if name != "alpha") or setting.method
