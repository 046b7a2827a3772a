"""From one suite's frame to tables, figures and one self-contained HTML page. Every number comes from the frame."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from dpgbench.report.figures import draw_figures
from dpgbench.report.frame import read_frame
from dpgbench.report.page import render_page
from dpgbench.report.tables import summary_markdown, task_markdown
from dpgbench.store import write_atomically

__all__ = ["build"]


def build(frame: pd.DataFrame, folder: str | Path, *, suite: str, command: str, title: str | None = None) -> Path:
    """Write `index.html`, `tables/*.md` and `figures/*.png|svg` into `folder` and return the path of `index.html`.

    `frame` holds one row per (cell, snapshot) and one row per cell without a result (columns: report/frame.py); `command` is
    what regenerates the page and is only shown. The same frame, in any row order, gives the same bytes. Holes (failed cells,
    NaN scores, zero FLOPs, one seed) become notes on the page. ValueError if a non-empty frame lacks a column the report cannot
    do without. Files of an earlier build that this one does not write again are left alone.
    """
    folder = Path(folder)
    results = read_frame(frame, suite)
    figures = {task.label: draw_figures(task, results.styles) for task in results.tasks}

    _write(folder / "tables" / "summary.md", summary_markdown(results))
    for task in results.tasks:
        _write(folder / "tables" / f"{task.file_name}.md", task_markdown(task))
        for figure in figures[task.label]:
            write_atomically(folder / "figures" / f"{figure.file_name}.png", figure.png)
            write_atomically(folder / "figures" / f"{figure.file_name}.svg", figure.svg)
    index = folder / "index.html"  # last: a page that exists belongs to files that exist
    _write(index, render_page(results, figures, command=command, title=title or f"dpgbench: {suite}"))
    return index


def _write(path: Path, text: str) -> None:
    """A sampled text may hold half a surrogate pair, which UTF-8 cannot encode: show a question mark rather than fail."""
    write_atomically(path, text.encode("utf-8", "replace"))
