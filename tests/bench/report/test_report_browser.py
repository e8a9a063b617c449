"""The report in a real browser: nothing asked of the network, charts drawn, tables sorted and copied, phone, dark mode.

Needs Chromium, which `make test` installs. CREPE_DEPLOY_NO_BROWSER=1, set by hand, skips these tests.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crepe_deploy.bench.report.write import make_report
from crepe_deploy.bench.run.result import save_run

from tests.bench.report_runs import made_up_run

pytestmark = pytest.mark.skipif(
    os.environ.get("CREPE_DEPLOY_NO_BROWSER") == "1", reason="CREPE_DEPLOY_NO_BROWSER=1 is set"
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = '"><img src=x onerror=alert(1)><script>alert(2)</script>' + "W" * 120

CHARTS = """() => [...document.querySelectorAll(".drawing")].map((drawing) => {
  const svg = drawing.querySelector("svg");
  const box = svg.getBoundingClientRect();
  const inside = (r) => r.left >= box.left - 2 && r.right <= box.right + 2 && r.top >= box.top - 2
    && r.bottom <= box.bottom + 2;
  const marks = [...svg.querySelectorAll("path, use")].filter((mark) => {
    const r = mark.getBoundingClientRect();
    return (mark.getAttribute("style") || "").includes("var(--c") && r.width + r.height > 1 && inside(r);
  });
  const texts = [...svg.querySelectorAll("text")];
  return { label: drawing.getAttribute("aria-label"), width: box.width, height: box.height, marks: marks.length,
    texts: texts.length, cut: texts.filter((t) => !inside(t.getBoundingClientRect())).map((t) => t.textContent) };
})"""

CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = light(parse(getComputedStyle(document.body).backgroundColor));
  const ratio = (text) => {
    const [high, low] = [light(parse(text)), paper].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const worst = (selector, property) => Math.min(...[...document.querySelectorAll(selector)]
    .map((found) => getComputedStyle(found)[property]).filter((colour) => colour.startsWith("rgb(")).map(ratio));
  return { paper,
    text: worst("p:not(.status), td, th, a, h1, h2, h3, summary, small", "color"),
    drawn: worst("svg text", "fill"),
    marks: worst('svg [style*="stroke: var(--c"]', "stroke") };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    browser_path = next((path for name in NAMES if (path := shutil.which(name)) is not None), None)
    if browser_path is None:
        pytest.fail("no Chromium: `make test` installs it as root; else install it, or set CREPE_DEPLOY_NO_BROWSER=1")
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser_path, args=options)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two made-up runs."""
    root = tmp_path_factory.mktemp("browser")
    paths = [root / f"run{seed}.json" for seed in range(2)]
    for seed, path in enumerate(paths):
        save_run(made_up_run(seed, rounds=3), path)
    make_report(paths, root / "out")
    return root / "out" / "report.html"


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1200, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_from_disk_silently_and_asks_for_nothing_else(browser: Any, report: Path, scheme: str) -> None:
    opened = Opened(browser, report, scheme=scheme)
    with opened as page:
        assert page.title().startswith("Benchmark report")
        assert opened.said == []
        assert opened.asked == [report.as_uri()]


def test_no_chart_is_empty_or_cut(browser: Any, report: Path) -> None:
    with Opened(browser, report) as page:
        charts = page.evaluate(CHARTS)
    assert len(charts) >= 12
    for chart in charts:
        assert chart["width"] > 300 and chart["height"] > 150, chart
        assert chart["marks"] >= 4 and chart["texts"] >= 6, chart
        assert chart["cut"] == [], chart


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_scheme_and_contrast(browser: Any, report: Path, scheme: str) -> None:
    with Opened(browser, report, scheme=scheme) as page:
        contrasts = page.evaluate(CONTRASTS)
    assert (contrasts["paper"] < 0.1) == (scheme == "dark")
    assert contrasts["text"] >= 4.5 and contrasts["drawn"] >= 4.5 and contrasts["marks"] >= 3, contrasts


def column(page: Any, table: str, index: int) -> list[str]:
    """The texts of a column, top to bottom."""
    return [str(text) for text in page.locator(f"#{table} tbody tr > *:nth-child({index})").all_text_contents()]


def test_tables_sort_by_keyboard_both_ways_with_unknowns_last(browser: Any, report: Path) -> None:
    with Opened(browser, report) as page:
        head = page.locator("#t-quality-table thead th", has_text="Mean KL")
        head.locator("button").focus()
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        order = ["int8", "crepe-16:32-packed", "crepe-2:4-packed", "ria-2:4", "dense"]
        assert column(page, "t-quality-table", 1) == order
        page.keyboard.press("Space")
        assert head.get_attribute("aria-sort") == "descending"
        assert column(page, "t-quality-table", 1) == [*reversed(order[:4]), "dense"]
        assert "Sorted by Mean KL" in page.locator("#status").text_content()


@pytest.mark.parametrize(("kind", "mark"), [("TSV", "\t"), ("Markdown", " | ")])
def test_tables_copy(browser: Any, report: Path, kind: str, mark: str) -> None:
    with Opened(browser, report) as page:
        page.locator("#t-summary .tools button", has_text=f"Copy as {kind}").click()
        page.locator("#status", has_text=f"Copied as {kind}").wait_for()
        page.evaluate("document.body.prepend(Object.assign(document.createElement('textarea'), {id: 'paste'}))")
        page.locator("#paste").focus()
        page.keyboard.press("Control+V")
        lines = page.locator("#paste").input_value().strip().split("\n")
        names = column(page, "t-summary", 1)
    lines = [line for line in lines if "---" not in line]
    assert len(lines) == 1 + len(names) == 6
    assert len({line.count(mark) for line in lines}) == 1 and lines[0].count(mark) >= 6
    for name, line in zip(names, lines[1:], strict=True):
        assert name in line


def test_a_link_to_a_folded_table_opens_it(browser: Any, report: Path) -> None:
    with Opened(browser, report) as page:
        table = page.locator("#t-layers-table table")
        assert not table.is_visible()
        page.locator("#f-layers-sparsity a").click()
        assert table.is_visible()


def test_a_phone_needs_no_sideways_scroll_and_names_stay_text(browser: Any, tmp_path: Path) -> None:
    run = made_up_run(rounds=1, baseline=HOSTILE, name=HOSTILE, command=HOSTILE)
    first = run.candidates[0].model_copy(update={"name": HOSTILE, "notes": {HOSTILE: HOSTILE}})
    save_run(run.model_copy(update={"candidates": [first, *run.candidates[1:]]}), tmp_path / "run.json")
    make_report([tmp_path / "run.json"], tmp_path / "out")
    opened = Opened(browser, tmp_path / "out" / "report.html", width=390)
    with opened as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert min(chart["width"] for chart in page.evaluate(CHARTS)) > 250
        smallest = page.evaluate(
            "Math.min(...[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height))"
        )
        assert smallest >= 7
        assert opened.said == [] and len(opened.asked) == 1


def test_it_can_be_pictured(browser: Any, report: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    with Opened(browser, report, scheme="dark") as page:
        page.screenshot(path=tmp_path / "page.png", full_page=True)
    picture = imread(tmp_path / "page.png")
    assert picture.shape[1] == 1200 and picture.shape[0] > 3000
    assert picture[..., :3].std() > 0.05
