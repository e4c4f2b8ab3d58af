"""The notebooks of docs run from top to bottom, and their last lines show what they should."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from optional import optional
from parsed import parsed

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.ipynb"))


def executed(path: Path) -> list[Any]:
    """What Jupyter would show of each cell: the value of its last expression, None where there is none."""
    names: dict[str, Any] = {}
    shown = []
    for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], "a notebook is committed without outputs"
        body = ast.parse("".join(cell["source"]), f"{path.name}, cell {number}")
        last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
        exec(compile(body, f"{path.name}, cell {number}", "exec"), names)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"{path.name}, cell {number}", "eval"), names)
        shown.append(value)
    return shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_a_record(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optional("sklearn", "demo")
    optional("jinja2", "report")
    optional("matplotlib", "report")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (record,) = [value for value in executed(path) if hasattr(value, "_repr_html_")]
    tree = parsed(record._repr_html_())
    assert any(each.one("caption").text.startswith("Scores") for each in tree.all("table"))
    assert tree.all("ul")[0].attributes["class"] == "plain"  # warnings
    is_sweep = "guidance" in path.stem
    assert len([each for each in tree.all("svg") if each.attributes.get("role") == "img"]) == 4 * is_sweep


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"compare_your_samples", "guidance_trade_off"}
