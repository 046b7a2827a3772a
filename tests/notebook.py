"""Executes docs/results.ipynb as Jupyter would, without Jupyter. `PYTHONPATH=. python tests/notebook.py` stores what its cells show anew.

A cell's lines that begin with % (Jupyter's own) are left out. What a cell shows: what it prints, and its last line's value where that is an
expression, as plain text and, where the object has one, as HTML or a picture.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "results.ipynb"


def source_of(cell: dict) -> str:
    return "".join(line for line in "".join(cell["source"]).splitlines(keepends=True) if not line.startswith("%"))


def execute(notebook: dict) -> list[list[dict]]:
    """The outputs of every code cell, in nbformat 4, all cells in one namespace."""
    names: dict[str, object] = {}
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [_outputs(source_of(cell), names, count) for count, cell in enumerate(codes, 1)]


def _outputs(source: str, names: dict[str, object], count: int) -> list[dict]:
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names) if last else None
    outputs = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)})
    if value is not None:
        outputs.append({"data": _shown(value), "execution_count": count, "metadata": {}, "output_type": "execute_result"})
    return outputs


def _shown(value: object) -> dict[str, object]:
    shown: dict[str, object] = {"text/plain": repr(value).splitlines(keepends=True)}
    if isinstance(value, Figure):
        picture = io.BytesIO()
        value.savefig(picture, format="png", dpi=90, metadata={"Software": None})
        shown = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}
    elif hasattr(value, "_repr_html_"):
        shown["text/html"] = value._repr_html_().splitlines(keepends=True)
    return shown


def main() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, (cell, outputs) in enumerate(zip(codes, execute(notebook), strict=True), 1):
        cell.update(execution_count=count, outputs=outputs)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
