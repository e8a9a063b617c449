"""The report: what its page holds, what is missing or refused, and that untrusted names stay text."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from crepe_deploy.bench.commands.report import report_command
from crepe_deploy.bench.report.loading import load_groups
from crepe_deploy.bench.report.write import make_report
from crepe_deploy.bench.run.result import Memory, Run, save_run

from crepe_deploy.errors import ConfigError, CrepeError, OutputError
from tests.bench.report_runs import made_up_run, small, without

HOSTILE = "<script>alert(1)</script>\"'|`$x$ _[a](javascript:b)\u202e\n& {{7*7}} 模型 " + "y" * 90


class Page(HTMLParser):
    """What a page holds: tags with attributes, text, headings in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def count(self, tag: str) -> int:
        return sum(own == tag for own, _ in self.tags)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three made-up runs of one scenario."""
    root = tmp_path_factory.mktemp("report")
    paths = [root / f"run{seed}.json" for seed in range(3)]
    for seed, path in enumerate(paths):
        save_run(made_up_run(seed, rounds=4, commit=f"{seed}abcdef"), path)
    make_report(paths, root / "out")
    return root / "out"


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Run, str], Path]:
    def save(run: Run, name: str = "run.json") -> Path:
        save_run(run, tmp_path / name)
        return tmp_path / name

    return save


# The page


def test_every_figure_has_words_numbers_and_a_png(report: Path) -> None:
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    drawings = [attributes for _, attributes in page.tags if attributes.get("class") == "drawing"]
    assert len(drawings) == page.count("figure") == page.count("figcaption") >= 12
    assert all(drawing["role"] == "img" and len(drawing["aria-label"] or "") > 40 for drawing in drawings)
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert all(link is not None and link.startswith("#") and link[1:] in ids for link in links)
    images = sorted((report / "figures").glob("*.png"))
    assert len(images) == len(drawings)
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)


def test_tables_have_captions_and_scopes_and_headings_go_down_one_by_one(report: Path) -> None:
    page = Page((report / "report.html").read_text(encoding="utf-8"))
    assert page.count("table") == page.count("caption") > 8
    assert all(attributes.get("scope") in {"col", "row"} for tag, attributes in page.tags if tag == "th")
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_page_asks_the_network_for_nothing(report: Path) -> None:
    html = (report / "report.html").read_text(encoding="utf-8")
    assert "default-src &#39;none&#39;" in html
    outside = [url for url in re.findall(r"https?://[^\s\"'<)]+", html) if not url.startswith("http://www.w3.org/")]
    assert outside == []
    assert not {"img", "link", "iframe", "object"} & {tag for tag, _ in Page(html).tags}


def test_conditions_and_history_are_told(report: Path) -> None:
    text = Page((report / "report.html").read_text(encoding="utf-8")).text
    facts = ["Made-up CPU 9000", "2 threads", "vllm 0.32.0", "crepe-deploy bench configs/made-up.yaml", "0.40, 1.90"]
    for fact in [*facts, "2026-01-03 2abcdef", "window=512", "KV cache for 4 096 tokens"]:
        assert fact in text, fact
    gained = (269_000_000 - 176_000_000) // 46_080
    assert f"{gained:,}".replace(",", "\u202f") in (report / "report.html").read_text(encoding="utf-8")


def test_the_markdown_holds_the_answer_and_links_to_figures_that_exist(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    assert "Should I prune, quantise, or both? Quantise." in text
    links = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(links) > 8 and all((report / link).is_file() for link in links)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_reports_of_equal_runs_are_equal(written: Callable[[Run, str], Path], tmp_path: Path) -> None:
    paths = [written(small(seed), f"run{seed}.json") for seed in range(2)]
    make_report(paths, tmp_path / "one")
    make_report(paths, tmp_path / "two")
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    assert len(files) > 4
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_hostile_names_stay_text(written: Callable[[Run, str], Path], tmp_path: Path) -> None:
    run = made_up_run(rounds=2, name=HOSTILE, command=HOSTILE)
    names = {candidate.name: f"{i}{HOSTILE}" for i, candidate in enumerate(run.candidates)} | {"int8": "_" + HOSTILE}
    candidates = [
        c.model_copy(update={"name": names[c.name], "kind": HOSTILE, "folder": HOSTILE, "notes": {HOSTILE: HOSTILE}})
        for c in run.candidates
    ]
    failed = candidates[1].series[0].visits[0].requests[0].model_copy(update={"error": HOSTILE})
    candidates[1].series[0].visits[0].requests[0] = failed
    run = run.model_copy(update={"candidates": candidates, "baseline": names["dense"]})
    make_report([written(run, "run.json")], tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.count("script") == 1
    assert "{{7*7}}" in html and "alert(1)" in page.text
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    for _, attributes in page.tags:
        assert not (attributes.get("href") or "").startswith("javascript")
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "<script" not in text and "[a](javascript" not in text


# What is missing or cannot be compared


def test_sections_without_data_are_sentences(written: Callable[[Run, str], Path], tmp_path: Path) -> None:
    run = without(made_up_run(rounds=1), quality=None, layers=[], memory=Memory(weights_bytes=1000))
    point = run.workload.points[0]
    run = without(run, series=[run.candidates[0].series[0]])
    run = run.model_copy(update={"workload": run.workload.model_copy(update={"points": [point]}), "noise": None})
    make_report([written(run, "run.json")], tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    for sentence in (
        "Quality was not measured in this run.",
        "The run file holds no per-layer figures.",
        "No trade-off is shown: fewer than two candidates have a perplexity ratio.",
        "No curve is shown: no two points differ only in batch size or in requests in flight.",
        "One run of this scenario was given.",
        "This run cannot say.",
    ):
        assert sentence in page.text
    assert page.count("figure") == len(list((tmp_path / "out" / "figures").iterdir()))


def test_failed_requests_are_listed_and_enter_no_latency(written: Callable[[Run, str], Path], tmp_path: Path) -> None:
    run = made_up_run(rounds=2)
    broken = run.candidates[1].series[0]
    visits = [
        v.model_copy(
            update={"requests": [r.model_copy(update={"error": "503 busy", "itl_s": [9e9]}) for r in v.requests]}
        )
        for v in broken.visits
    ]
    candidate = run.candidates[1].model_copy(update={"series": [broken.model_copy(update={"visits": visits})]})
    run = run.model_copy(update={"candidates": [run.candidates[0], candidate]})
    make_report([written(run, "run.json")], tmp_path / "out")
    text = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).text
    assert "503 busy" in text and "4 failed requests" in text
    assert "“ria-2:4” could not be compared at b1: no round in which both answered." in text
    assert "9.00e+09" not in text and "Gs" not in text


def test_runs_that_must_not_be_mixed_get_chapters(written: Callable[[Run, str], Path], tmp_path: Path) -> None:
    one = small(0)
    host = one.environment.host.model_copy(update={"cpu": "Another CPU"})
    other = small(1, environment=one.environment.model_copy(update={"host": host}))
    later = small(2)
    shorter = small(3, workload=one.workload.model_copy(update={"seed": 7}))
    paths = [written(run, f"{i}.json") for i, run in enumerate((later, one, other, shorter, one))]
    groups = load_groups(paths)
    assert [[source.run.created[:10] for source in group.sources] for group in groups] == [
        ["2026-01-01", "2026-01-03"], ["2026-01-02"], ["2026-01-04"],
    ]  # fmt: skip
    make_report(paths, tmp_path / "out")
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.count("h2") == 3 and "do not compare absolute figures across chapters" in page.text


# Refusals


def refused(*arguments: object) -> CrepeError:
    """The error that the command ends with."""
    result = CliRunner().invoke(report_command, [str(argument) for argument in arguments])
    assert isinstance(result.exception, CrepeError), result.output
    assert result.exception.exit_code == 2
    return result.exception


def nan_times(document: dict[str, Any]) -> None:
    document["candidates"][0]["series"][0]["visits"][0]["requests"][0]["itl_s"][0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(baseline="gone"), "no candidate 'gone'"),
        (lambda d: d["workload"]["points"].pop(), "no point 'served-4'"),
        (lambda d: d["candidates"].append(d["candidates"][0]), "candidate 'dense' twice"),
        (nan_times, "NaN is no number"),
        (lambda d: [c.update(series=[]) for c in d["candidates"]], "holds no samples"),
        (lambda d: d.update(schema_version=2), "schema version 2"),
        (lambda d: d.pop("workload"), "no benchmark run: workload"),
    ],
)
def test_unusable_runs_are_refused(
    damage: Callable[[dict[str, Any]], Any], message: str, written: Callable[[Run, str], Path], tmp_path: Path
) -> None:
    path = written(made_up_run(rounds=1), "run.json")
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    error = refused(path, "--out", tmp_path / "out")
    assert isinstance(error, ConfigError)
    assert message in str(error) and "run.json" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_missing_and_truncated_files_are_named(written: Callable[[Run, str], Path], tmp_path: Path) -> None:
    path = written(made_up_run(rounds=1), "run.json")
    assert "gone.json" in str(refused(tmp_path / "gone.json", "--out", tmp_path / "out"))
    path.write_text(path.read_text()[:2000])
    assert "run.json is not JSON that can be read, perhaps cut short" in str(refused(path, "--out", tmp_path / "out"))
    path.write_bytes(b"\xff\xfe\x00")
    assert "run.json" in str(refused(path, "--out", tmp_path / "out"))


def test_outputs_that_exist_or_cannot_be_made_are_refused(written: Callable[[Run, str], Path], tmp_path: Path) -> None:
    path = written(made_up_run(rounds=1), "run.json")
    assert "inside" in str(refused(path, "--out", tmp_path, "--overwrite"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert "exists" in str(refused(path, "--out", mine))
    assert "thesis.txt" in str(refused(path, "--out", mine, "--overwrite"))
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert isinstance(refused(path, "--out", path / "below"), OutputError)


def test_an_earlier_report_is_replaced_on_request_only(
    report: Path, written: Callable[[Run, str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(report, out)
    path = written(small(), "run.json")
    refused(path, "--out", out)
    result = CliRunner().invoke(report_command, [str(path), "--out", str(out), "--overwrite", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    assert document["chapters"][0]["answer"] == "undecided"
    assert sorted(document["files"]) == sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run.json"]


def test_a_failure_in_the_middle_leaves_nothing(
    written: Callable[[Run, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(small(), "run.json")

    def full(_report: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("crepe_deploy.bench.report.write.markdown", full)
    result = CliRunner().invoke(report_command, [str(path), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, CrepeError) and "disk is full" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named_with_its_extra(
    module: str, written: Callable[[Run, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(small(), "run.json")
    monkeypatch.setitem(sys.modules, module, None)
    error = refused(path, "--out", tmp_path / "out")
    assert module in str(error) and "crepe-deploy[bench]" in str(error)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
