"""The table of families: what it says of them stands in the docs, and what it lacks has a reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from crepe_deploy.model.families import FAMILIES, Family, covered

DOCS = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def row(name: str, family: Family) -> str:
    """One line of the table in the docs."""
    cells = (
        "through a norm" if any(entry.norm for entry in family.residuals) else "yes" if family.residuals else "",
        ", ".join(dict.fromkeys(fold.kind.partition(" ")[0] for fold in family.folds)),
        "yes" if family.last_norm else "",
        "yes" if family.bos else "",
        "yes" if family.structural else "",
        ", ".join(family.onnx),
    )
    return f"| `{name}` | {' | '.join(cell or '-' for cell in cells)} |"


def test_the_docs_say_what_each_family_can_do() -> None:
    """Widths of their own for the layers change nothing but what is said beside the table."""
    text = DOCS.read_text(encoding="utf-8")
    rows = [row(name, family) for name, family in FAMILIES.items() if not family.per_layer_of and family.last_norm]
    assert "\n".join(rows) in text
    for name, family in FAMILIES.items():
        if family.per_layer_of:
            base = FAMILIES[family.per_layer_of]
            assert (family.residuals, family.folds, family.last_norm) == (base.residuals, base.folds, base.last_norm)
            assert family.onnx == tuple(flavor for flavor in base.onnx if flavor != "genai"), name
        elif not family.last_norm:
            assert f"`{name}`" in text


def test_every_tested_family_has_every_step() -> None:
    for name in covered():
        family = FAMILIES[name]
        assert family.residuals, name
        assert {fold.kind.partition(" ")[0] for fold in family.folds} == {"neurons", "values"}, name


def test_a_flavour_that_is_missing_has_a_reason() -> None:
    for name, family in FAMILIES.items():
        if family.onnx:
            missing = {"portable", "genai"} - set(family.onnx)
            assert family.lacks.keys() >= {f"onnx {flavor}" for flavor in missing}, name


def test_the_table_is_data() -> None:
    script = "import sys, crepe_deploy.model.families; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
