"""Charts of measurements that no machine made: drawn in silence, or refused where they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crepe_deploy.bench.report.chapters import build_report
from crepe_deploy.bench.report.loading import load_groups
from crepe_deploy.bench.report.style import drawing, legend_below, render

from crepe_deploy.errors import ConfigError
from tests.bench.report_runs import charted

LONG = "W " * 150
Document = dict[str, Any]
NAMES = {
    "quality-memory", "quality-speed", "forest-tpot-s", "forest-ttft-s", "forest-itl-p99-s",
    "forest-output-tokens-per-s", "load", "itl-cdf", "itl-cdf1", "memory", "layers-sparsity",
    "layers-error", "history-figure",
}  # fmt: skip


def long_texts(run: Document) -> None:
    run["name"] = run["created"] = LONG
    run["environment"]["host"] |= {"cpu": LONG, "isa": LONG, "system": LONG}
    run["environment"]["commit"] = LONG
    run["workload"]["dtype"] = LONG
    for candidate in run["candidates"]:
        candidate |= {"name": candidate["name"] + LONG, "kind": LONG, "method": LONG, "format": LONG}
        for series in candidate["series"]:
            series["point"] = LONG + series["point"]
    run["baseline"] += LONG
    for point in run["workload"]["points"]:
        point["name"] = LONG + point["name"]


def no_bytes(run: Document) -> None:
    for candidate in run["candidates"]:
        candidate["memory"] = {"weights_bytes": 0, "peak_bytes": 0, "kv_token_bytes": 0}


def no_bytes_of_one(run: Document) -> None:
    run["candidates"][1]["memory"]["weights_bytes"] = 0


def many_bytes(run: Document) -> None:
    for name in run["candidates"][1]["memory"]:
        run["candidates"][1]["memory"][name] = 2**53 - 1


def rounds_apart(run: Document) -> None:
    for candidate in run["candidates"]:
        for series in candidate["series"]:
            for visit in series["visits"]:
                fast = (visit["round"] == 0) == (candidate["name"] == run["baseline"])
                time = 1e-12 if fast else 1e11
                visit["duration_s"] = time
                for request in visit["requests"]:
                    request |= {"ttft_s": time, "latency_s": 2 * time, "itl_s": [time] * 3}


def noise(run: Document) -> None:
    run["noise"] = dict.fromkeys(run["noise"], 100)


def layers(run: Document) -> None:
    layer = run["candidates"][1]["layers"][0]
    names = ("model.layers." + "9" * 400 + ".x", "model.layers.99999.x", "x.3.y" * 99, "$\\frac{\x07\u202e")
    run["candidates"][1]["layers"] = [
        layer | {"name": name, "error": error, "sparsity": share, "shape": [2**53 - 1] * 2}
        for name, error, share in zip(names, (1e30, 0, 1e-320, None), (1, 0, 1e-320, 1.0), strict=True)
    ]


def quality(value: float) -> Callable[[Document], None]:
    def change(run: Document) -> None:
        for name in ("perplexity_ratio", "perplexity", "kl_mean", "kl_p99", "same_top"):
            run["candidates"][1]["quality"][name] = {"value": value, "low": min(value, 1), "high": max(value, 1)}

    return change


def drawn(folder: Path, change: Callable[[Document], object]) -> set[str]:
    """The charts of two runs, of which both were changed; the suite makes an error of every warning."""
    paths = []
    for seed in (0, 1):
        document = json.loads(charted(seed).model_dump_json())
        change(document)
        paths.append(folder / f"{seed}.json")
        paths[-1].write_text(json.dumps(document))
    report = build_report(load_groups(paths))
    return {figure.name for chapter in report.chapters for section in chapter.sections for figure in section.figures}


def test_every_kind_of_chart_is_drawn_of_the_sample(tmp_path: Path) -> None:
    assert drawn(tmp_path, lambda run: None) == NAMES


@pytest.mark.parametrize(
    "change",
    [long_texts, no_bytes, no_bytes_of_one, many_bytes, rounds_apart, noise, layers, quality(1.7976931348623157e308),
     quality(1e-320)],
)  # fmt: skip
def test_measurements_at_the_ends_of_what_is_read_are_drawn(tmp_path: Path, change: Callable[[Document], None]) -> None:
    assert drawn(tmp_path, change) >= {"memory", "forest-tpot-s", "itl-cdf"}


def _entry(run: Document, *names: Any) -> Any:
    for name in names:
        run = run[name]
    return run


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("quality", "perplexity_ratio", "value"), 0), (("quality", "perplexity_ratio", "low"), -1),
        (("quality", "perplexity_ratio", "high"), -1e308), (("layers", 0, "sparsity"), 2),
        (("layers", 0, "sparsity"), -1), (("layers", 0, "error"), -1), (("layers", 0, "error"), 1e308),
        (("layers", 0, "shape", 0), 0), (("series", 0, "visits", 0, "round"), 2**63),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, place: tuple[Any, ...], value: float) -> None:
    def change(run: Document) -> None:
        _entry(run["candidates"][1], *place[:-1])[place[-1]] = value

    with pytest.raises(ConfigError, match="is no benchmark run"):
        drawn(tmp_path, change)


def test_more_candidates_than_a_page_can_show_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 100"):
        drawn(tmp_path, lambda run: run["candidates"].extend(run["candidates"] * 50))


def test_a_long_legend_leaves_its_axes_room() -> None:
    with drawing() as (drawn, [axes]):
        handles = [axes.plot([0, 1], [number, 1])[0] for number in range(40)]
        legend_below(drawn, handles, [f"a candidate of a long name {number}" for number in range(40)])
        assert render(drawn, "x", "A title", "conditions " * 200)[1]
