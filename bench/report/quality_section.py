"""Quality: its table, and its trade-offs with memory and with speed."""

from __future__ import annotations

import json
from collections.abc import Callable

from ..run.result import Interval, Quality
from .charts import Spot, Words, trade_off
from .compare import Entry
from .content import Section, Table, cell, estimate, without_empty_columns
from .scene import Scene

_COLUMNS = (
    "Perplexity (lower is better)", "Perplexity × baseline (lower is better)", "Mean KL, nats (lower is better)",
    "p99 KL, nats (lower is better)", "Same top token (higher is better)",
)  # fmt: skip


def trade_offs(scene: Scene) -> Section:
    """Quality against weight bytes and against decode speed."""
    headline = scene.comparison.headline
    memory = trade_off(
        _spots(scene, lambda entry: None if entry.weights is None else Interval(value=entry.weights)),
        Words(
            scene.name("quality-memory"), "Quality against weight bytes: lower left is better",
            "weight bytes over the baseline's", "perplexity over the baseline's", scene.machine, scene.name("summary"),
        ),
        higher_x=False,
    )  # fmt: skip
    speed = None
    if headline is not None:
        point = headline.name
        speed = trade_off(
            _spots(scene, lambda entry: entry.ratio(point, "decode_tokens_per_s")),
            Words(
                scene.name("quality-speed"), "Quality against decode speed: lower right is better",
                "decode speed over the baseline's", "perplexity over the baseline's", scene.at(headline),
                scene.name("summary"),
            ),
            higher_x=True,
        )  # fmt: skip
    figures = tuple(figure for figure in (memory, speed) if figure is not None)
    text = ("The dotted line joins the candidates that no other beats in both directions (the Pareto frontier).",)
    missing = None if figures else "No trade-off is shown: fewer than two candidates have a perplexity ratio."
    return Section(scene.name("trade-offs"), "What is traded", text if figures else (), figures, (), missing)


def _spots(scene: Scene, x_of: Callable[[Entry], Interval | None]) -> list[Spot]:
    spots = []
    for entry in scene.comparison.entries:
        x, y = x_of(entry), entry.perplexity_ratio()
        if x is not None and y is not None:
            spots.append(Spot(entry, x, y))
    return spots


def quality(scene: Scene) -> Section:
    """Perplexity, KL divergence and top-token agreement, each with its convention."""
    measured = [
        (entry, entry.candidate.quality) for entry in scene.comparison.entries if entry.candidate.quality is not None
    ]
    title = "Quality"
    if not measured:
        return Section(scene.name("quality"), title, missing="Quality was not measured in this run.")
    conventions: list[str] = []
    rows = []
    for entry, own in measured:
        told = convention(own)
        if told not in conventions:
            conventions.append(told)
        figures = (own.perplexity, entry.perplexity_ratio(), own.kl_mean, own.kl_p99, own.same_top)
        suffixes = ("", "×", "", "", "")
        cells = [estimate(figure, suffix) for figure, suffix in zip(figures, suffixes, strict=True)]
        rows.append((cell(entry.name), *cells, cell(f"({conventions.index(told) + 1})")))
    table = Table(
        scene.name("quality-table"),
        "Perplexity and divergence from the baseline, with 95 % bootstrap intervals over windows of text",
        ("Candidate", *_COLUMNS, "Convention"),
        tuple(rows),
        "Conventions: " + "; ".join(f"({i}) {text}" for i, text in enumerate(conventions, 1)),
    )
    text: tuple[str, ...] = (
        "Perplexity: how surprised the model is by real text, lower is better. KL: how far its next-token "
        "probabilities are from the baseline's, 0 is equal. Same top token: how often both would choose the same one.",
    )
    if len(conventions) > 1:
        text += ("Rows with different conventions must not be compared with one another.",)
    return Section(scene.name("quality"), title, text, (), (without_empty_columns(table),))


def convention(quality: Quality) -> str:
    """How a perplexity was measured, as one line; digests are left to the run file."""
    return ", ".join(
        f"{key}={value if isinstance(value, str | int | float) else json.dumps(value)}"
        for key, value in quality.convention.items()
        if key != "sha256"
    )
