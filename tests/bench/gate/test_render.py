"""Every output says the same as the verdict, whatever is in its texts."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree

import pytest
from crepe_deploy.bench.gate import render
from crepe_deploy.bench.gate.arms import PRUNED
from crepe_deploy.bench.gate.verdict import SEVERITY, Row, Verdict
from crepe_deploy.bench.run.result import Interval
from rich.console import Console

NASTY = "a|b <script>\x00\x1b[31m `x` @everyone & ]]> \\"


@pytest.fixture
def verdict() -> Verdict:
    rows = [
        Row(
            candidate="packed", check="latency", point="b1", metric=f"{status.lower()}_s", status=status, reason=NASTY,
            comparison="paired by round", value=Interval(value=1.1, low=1.05, high=1.2), limit=1.05, baseline=0.02,
            measured=0.022, rounds=8, noise=0.01, p=0.001,
        )
        for status in SEVERITY
    ]  # fmt: skip
    rows.append(Row(candidate="packed", check="memory", metric="peak_bytes", status="PASS", reason="fine",
                    value=Interval(value=0.5), limit=1.02, baseline=2e8, measured=1e8))  # fmt: skip
    return Verdict(
        gate=PRUNED, status="INVALID", baseline="dense", candidates=["packed"], level=0.975, looks=2, rows=rows,
        notes=[NASTY],
    )  # fmt: skip


def test_json_gives_the_verdict_back(verdict: Verdict, capsys: pytest.CaptureFixture[str]) -> None:
    render.show(verdict, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert Verdict.model_validate(document) == verdict
    assert document["gate"] == "pruned against dense" and document["kind"] == "crepe-deploy-verdict"


def test_junit_is_what_ci_systems_read(verdict: Verdict) -> None:
    root = ElementTree.fromstring(render.junit(verdict).encode())
    assert root.tag == "testsuites"
    (suite,) = root.findall("testsuite")
    for element in (root, suite):
        counted = {name: element.get(name) for name in ("tests", "failures", "errors", "skipped")}
        assert counted == {"tests": "5", "failures": "1", "errors": "1", "skipped": "1"}
    cases = suite.findall("testcase")
    assert len(cases) == 5 and all(case.get("classname") and case.get("name") and case.get("time") for case in cases)
    assert len({(case.get("classname"), case.get("name")) for case in cases}) == 5
    for tag in ("failure", "error", "skipped"):
        (outcome,) = [child for case in cases for child in case.findall(tag)]
        assert "INVALID FAIL INCONCLUSIVE".count((outcome.get("message") or "").split(":")[0]) == 1
        assert "1.1 [1.05, 1.2]" in (outcome.text or "")
    assert "pruned against dense" in (suite.get("name") or "")


def test_junit_drops_characters_that_xml_forbids(verdict: Verdict) -> None:
    text = render.junit(verdict)
    assert "\x00" not in text and "\x1b" not in text and "\N{REPLACEMENT CHARACTER}" in text


def test_markdown_keeps_its_table_whatever_the_reasons_hold(verdict: Verdict) -> None:
    text = render.markdown(verdict)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(verdict.rows)
    assert {line.replace("\\\\", "").replace("\\|", "").count("|") for line in rows} == {10}
    assert "<script>" not in text and "@everyone" not in text
    assert text.startswith("### ⛔ INVALID: pruned against dense")


def test_the_terminal_shows_every_row_without_markup(verdict: Verdict) -> None:
    console = Console(file=io.StringIO(), width=240, record=True)
    for part in render.terminal(verdict):
        console.print(part)
    text = console.export_text()
    for status in SEVERITY:
        assert f"b1 {status.lower()}_s" in text
    assert "200 MB" in text and "100 MB" in text and "0.022 s" in text and "each of 2 looks" in text
