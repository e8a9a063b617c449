"""Values of settings, looked up in the journal first: proxies in parallel threads, losses in batches."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crepe_deploy.model.decoder import Decoder, LinearSpec
from crepe_deploy.pattern import Pattern
from crepe_deploy.progress import Show
from crepe_deploy.store.journal import Journal, numbers
from crepe_deploy.texts import CalibrationSet

from .losses import Losses, MaskedModel
from .proxies import PROXIES, proxy_errors, proxy_values
from .sample import LayerSample
from .space import Setting
from .statistics import SampleRule, collect

MOST_NATS = 700  # of a window, whose perplexity is still a number
BATCH = 8  # settings in one walk over the model: hidden states of each are held


@dataclass
class Evaluator:
    """A model's sampled layers and its losses under masks, made on first use, behind one journal.

    folder: for the sampled layers; empty, and the caller's to remove. workers: threads that evaluate proxies.
    judged_s: seconds spent judging, and for how many settings, in this process.
    """

    decoder: Decoder
    targets: list[list[LinearSpec]]
    pattern: Pattern
    calibration: CalibrationSet
    text: CalibrationSet
    rule: SampleRule
    journal: Journal
    folder: Path
    workers: int
    show: Show
    judged_s: float = 0.0
    judged: int = 0
    _layers: list[LayerSample] = field(default_factory=list)

    @property
    def layers(self) -> list[LayerSample]:
        """The sampled layers, collected when first asked for."""
        if not self._layers:
            with self.show("dense statistics") as step:
                self._layers = collect(
                    self.decoder, self.targets, self.calibration.tokens, self.rule, self.folder, step
                )
        return self._layers

    def proxies(self, settings: list[Setting]) -> list[dict[str, float]]:
        """Every proxy of every setting."""
        known = partial(self.journal.get, "proxies", valid=_are_proxies)
        missing = {setting.key: setting for setting in settings if known(setting.key) is None}
        if missing:
            for key, values in zip(missing, self._in_threads(list(missing.values())), strict=True):
                self.journal.add("proxies", key, values)
        records = [known(setting.key) for setting in settings]
        return [dict(values) for values in records if values is not None]

    def _in_threads(self, settings: list[Setting]) -> list[dict[str, float]]:
        layers = self.layers
        if self.workers == 1:
            return [proxy_values(setting, layers, self.pattern) for setting in settings]
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(lambda setting: proxy_values(setting, layers, self.pattern), settings))
        finally:
            torch.set_num_threads(threads)

    def errors(self, setting: Setting) -> dict[str, float]:
        """Standard errors of the proxies of a setting from having sampled rows."""
        return proxy_errors(setting, self.layers, self.pattern)

    def losses(self, settings: list[Setting], label: str = "judging on the search text") -> list[Losses]:
        """The losses of every setting."""
        known = partial(self.journal.get, "losses", valid=self._are_losses)
        missing = {setting.key: setting for setting in settings if known(setting.key) is None}
        names = list(missing)
        for start in range(0, len(names), BATCH):
            batch = [missing[name] for name in names[start : start + BATCH]]
            for setting, losses in zip(batch, self._measure(batch, label), strict=True):
                self.journal.add("losses", setting.key, losses.record())
        records = [known(setting.key) for setting in settings]
        return [Losses(**record) for record in records if record is not None]

    def _are_losses(self, value: Any) -> bool:
        windows = len(self.text.tokens)
        return (
            isinstance(value, dict)
            and sorted(value) == ["kl", "nll"]
            and all(numbers(own, windows) and max(map(abs, own)) <= MOST_NATS for own in value.values())
        )

    def _measure(self, settings: list[Setting], label: str) -> list[Losses]:
        norms = {layer.key: layer.col_norm for layer in self.layers}
        masked = MaskedModel(self.decoder, self.targets, self.pattern, self.text.tokens, norms)
        started = time.monotonic()
        with self.show(f"{label}, {len(settings)} settings") as step:
            losses = masked(settings, step)
        self.judged_s += time.monotonic() - started
        self.judged += len(settings)
        return losses

    @property
    def seconds_a_setting(self) -> float:
        """Mean seconds that judging one setting took in this process; 0 before the first."""
        return self.judged_s / self.judged if self.judged else 0.0


def _are_proxies(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == PROXIES.keys() and numbers(list(value.values()))
