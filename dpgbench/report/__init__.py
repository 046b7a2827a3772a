"""From one suite's frame to tables, figures and one self-contained HTML page. Every number comes from the frame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dpgbench.core.files import write_atomically
from dpgbench.core.protocol import NOTHING_FIXED, Protocol
from dpgbench.report.at_budgets import budgets_table
from dpgbench.report.deployment_size import size_tables
from dpgbench.report.format import file_names
from dpgbench.report.over_tasks import Across, compute_across
from dpgbench.report.pooled import pooled_tables
from dpgbench.report.results import SuiteResults, read_frame
from dpgbench.report.summary_tables import means_table, overview_table, phi_table, summary_markdown, versus_tables
from dpgbench.report.table import Table, latex_file, markdown, records
from dpgbench.report.task_tables import gaps, notes_on, tables_of_task, task_markdown
from dpgbench.report.winners import over_tasks_table, winners_table

__all__ = ["build", "machine_readable"]


@dataclass(frozen=True, eq=False)
class Contents:
    """What a report says, before it is drawn: the tables over all tasks, of every method against the others, and of every task.

    `budgets` is the answer that comes first. `pooled` has the primary tests, none where the suite's protocol names no reference.
    `over_tasks` has a method against the others on all tasks at once; not every method of `versus` need have one. `phi` is None where
    every headline is Phi.
    """

    results: SuiteResults
    across: Across
    budgets: Table
    overview: Table
    winners: Table
    means: Table
    phi: Table | None
    pooled: list[Table]
    versus: dict[str, Table]
    over_tasks: dict[str, Table]
    by_task: dict[str, list[Table]]


def read_contents(frame: pd.DataFrame, suite: str, protocol: Protocol = NOTHING_FIXED) -> Contents:
    """Every table of a suite; its primary tests are those of `protocol`.

    ValueError if a non-empty frame lacks a column the report cannot do without.
    """
    results = read_frame(frame, suite)
    across = compute_across(results, protocol)
    by_task = {
        task.label: tables_of_task(task, across.rows[task.label], across.pairs[task.label], across.anchors.get(task.label))
        + size_tables(task, results)
        for task in results.tasks
    }
    versus = versus_tables(results, across)
    over_tasks = {label: table for label in versus if (table := over_tasks_table(label, results, across))}
    overall = overview_table(results, across), winners_table(results, across), means_table(results, across), phi_table(results, across)
    pooled = pooled_tables(results, across.anchors, across.pooled, protocol)
    return Contents(results, across, budgets_table(results, across.rows), *overall, pooled, versus, over_tasks, by_task)


def build(
    frame: pd.DataFrame, folder: str | Path, *, suite: str, command: str, title: str | None = None, protocol: Protocol = NOTHING_FIXED
) -> Path:  # fmt: skip
    """Write `index.html`, `tables/*.md|tex` and `figures/*.png|svg` into `folder` and return the path of `index.html`.

    `frame` holds one row per (cell, snapshot) and one row per cell without a result (columns: report/results.py); `command` is
    what regenerates the page and is only shown. The same frame, in any row order, gives the same bytes. Holes (failed cells,
    NaN scores, zero FLOPs, one seed) become notes on the page. ValueError if a non-empty frame lacks a column the report cannot
    do without. Files of an earlier build that this one does not write again are left alone.
    """
    from dpgbench.report.deployment_figure import draw_sizes
    from dpgbench.report.html import render_page
    from dpgbench.report.summary_figures import draw_summary_figures
    from dpgbench.report.task_figures import draw_figures

    folder = Path(folder)
    contents = read_contents(frame, suite, protocol)
    results = contents.results
    figures = {
        task.label: [*draw_figures(task, results.styles, contents.across.rows[task.label]), *draw_sizes(task, results)]
        for task in results.tasks
    }
    overall = draw_summary_figures(results, contents.across)

    for name, text in table_files(contents).items():
        _write(folder / "tables" / name, text)
    for figure in [*overall, *(figure for drawn in figures.values() for figure in drawn)]:
        write_atomically(folder / "figures" / f"{figure.file_name}.png", figure.png)
        write_atomically(folder / "figures" / f"{figure.file_name}.svg", figure.svg)
    index = folder / "index.html"  # last: a page that exists belongs to files that exist
    _write(index, render_page(contents, overall, figures, command=command, title=title or f"dpgbench: {suite}"))
    return index


def table_files(contents: Contents) -> dict[str, str]:
    """{file name: content}: summary, primary tests, a file per task, a file per method against the others; Markdown and LaTeX each."""
    results = contents.results
    over_all = (
        [contents.budgets, contents.overview, contents.winners, contents.means, *filter(None, [contents.phi])] if results.tasks else []
    )
    stems = file_names([*(task.file_name for task in results.tasks), *(f"versus_{label}" for label in contents.versus)])
    task_files = [stems[task.file_name] for task in results.tasks]
    primary = ["pooled"] if contents.pooled else []
    files = {"summary.md": summary_markdown(results, over_all, [*primary, *stems.values()]), "summary.tex": latex_file(over_all)}
    if contents.pooled:
        shown = "\n".join(markdown(table, "#" if number % 2 == 0 else "##") for number, table in enumerate(contents.pooled))
        files |= {"pooled.md": shown.rstrip("\n") + "\n", "pooled.tex": latex_file(contents.pooled)}
    for task, stem in zip(results.tasks, task_files, strict=True):
        shown = contents.by_task[task.label]
        files |= {f"{stem}.md": task_markdown(task, shown, contents.across.rows[task.label]), f"{stem}.tex": latex_file(shown)}
    for label, table in contents.versus.items():
        stem, over_tasks = stems[f"versus_{label}"], [contents.over_tasks[label]] if label in contents.over_tasks else []
        shown = "\n".join([markdown(table, "#"), *map(markdown, over_tasks)])
        files |= {f"{stem}.md": shown.rstrip("\n") + "\n", f"{stem}.tex": latex_file([table, *over_tasks])}
    return files


def machine_readable(
    frame: pd.DataFrame, *, suite: str, command: str, title: str | None = None, protocol: Protocol = NOTHING_FIXED
) -> dict[str, object]:  # fmt: skip
    """Every table of the report with the unrounded numbers behind it, and every hole, as what JSON can hold. Errors as in `build`."""
    contents = read_contents(frame, suite, protocol)
    results, ranks = contents.results, contents.across.ranks
    found = {
        "suite": suite, "title": title or "", "command": command, "cells": results.cells_by_status,
        "budgets": records(contents.budgets), "overview": records(contents.overview),
        "winners": records(contents.winners), "pooled": [records(table) for table in contents.pooled],
        "means": records(contents.means), "phi": records(contents.phi) if contents.phi else None,
        "versus": {label: records(table) for label, table in contents.versus.items()},
        "over_tasks": {label: records(table) for label, table in contents.over_tasks.items()},
        "ranking": {
            "critical_difference": ranks.critical_difference, "friedman_p": ranks.friedman_p, "groups": [list(g) for g in ranks.groups],
            "seeds_by_task": {task: list(seeds) for task, seeds in ranks.seeds_by_task.items()}, "left_out": ranks.left_out,
        },
        "tasks": {
            task.label: {
                "headline": task.headline, "higher_is_better": task.higher_is_better, "description": task.description,
                "notes": notes_on(task, contents.across.rows[task.label]),
                "tables": {table.name.removeprefix(f"{task.file_name}-"): records(table) for table in contents.by_task[task.label]},
                "without_a_result": [
                    {"method": gap.method_label, "status": gap.status, "seeds": list(gap.seeds), "reason": gap.reason} for gap in gaps(task)
                ],
            }
            for task in results.tasks
        },
    }  # fmt: skip
    for key in ("critical_difference", "friedman_p"):
        found["ranking"][key] = None if found["ranking"][key] != found["ranking"][key] else found["ranking"][key]
    return found


def _write(path: Path, text: str) -> None:
    """A sampled text may hold half a surrogate pair, which UTF-8 cannot encode: show a question mark rather than fail."""
    write_atomically(path, text.encode("utf-8", "replace"))
