"""The report as one HTML file that opens from disk and asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from ...extras import require
from .content import Report, Table, is_numeric
from .style import DARK, LIGHT

_PARTS = Path(__file__).parent / "parts"


def page(report: Report) -> str:
    """Render the page. Every text is escaped; the policy lets no script but ours run. Raises MissingExtra."""
    require("the report", "jinja2")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (_PARTS / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return environment.get_template("report.html").render(
        report=report,
        policy=policy,
        script=Markup(script),
        style=Markup(_style()),
        drawing=lambda figure: Markup(figure.svg),
        numeric=_numeric,
    )


def _numeric(table: Table) -> list[bool]:
    return [is_numeric(table, column) for column in range(len(table.columns))]


def _style() -> str:
    css = (_PARTS / "report.css").read_text(encoding="utf-8")
    for name, colours in (("/*LIGHT*/", LIGHT), ("/*DARK*/", DARK)):
        css = css.replace(name, " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours)))
    return css
