"""The second axis: the score against the number of deployment texts, for suites whose cells have `scale.more_deployments`.

A method that trains a policy pays for it once, however many texts it writes then; best of n pays n times for every text. Which is cheaper
therefore depends on how many texts are wanted. Rows with a size in `deployment_texts` are such points, of each cell's last answer.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from dpgbench.report.format import amount, and_more, decimals_for, number
from dpgbench.report.plot_style import DrawnFigure, canvas, cut, line_look
from dpgbench.report.results import SuiteResults, TaskResults
from dpgbench.report.table import Cell, Column, Row, Table, text_cell
from dpgbench.report.task_tables import score_cell
from dpgbench.stats.over_seeds import Interval, mean_interval

SIZE = "deployment_texts"


def points_of(task: TaskResults, results: SuiteResults) -> dict[str, pd.DataFrame]:
    """Each method's points on a task by its label, in the order shown: cell, seed, deployment_texts, flops and the headline as `value`."""
    rows = results.deployments
    if rows.empty or task.finals.empty:
        return {}
    rows = rows[rows["cell"].isin(set(task.finals["cell"]))]  # of the cells that the task's other numbers are from
    column = task.headline if task.headline == "phi" else f"metric:{task.headline}"
    rows = rows.assign(value=rows[column] if column in rows.columns else np.nan).sort_values([SIZE, "seed"], kind="stable")
    kept = ["cell", "seed", SIZE, "flops", "value"]
    return {label: found[kept] for label in results.styles if len(found := rows[rows["method_label"] == label])}


def size_tables(task: TaskResults, results: SuiteResults) -> list[Table]:
    """Methods x sizes: the mean score with its interval, and the mean cost. None where no cell was deployed at another size."""
    points = points_of(task, results)
    if not points:
        return []
    sizes = sorted({int(size) for rows in points.values() for size in rows[SIZE]})
    scores = {label: {size: _score(rows, size) for size in sizes} for label, rows in points.items()}
    decimals = decimals_for(score.mean for by_size in scores.values() for score in by_size.values())
    body = []
    for label, rows in points.items():
        cells = [text_cell(label, method=label)]
        for size in sizes:
            flops = rows.loc[rows[SIZE] == size, "flops"].mean()
            cells += [score_cell(scores[label][size], decimals), Cell(amount(flops), "", flops, {"flops": flops})]
        body.append(Row(tuple(cells), (label,), results.styles[label].role))
    best = "descending" if task.higher_is_better else "ascending"
    columns = [Column("method", numeric=False, best="ascending")]
    for size in sizes:
        columns += [Column(f"{size} texts", best=best), Column("FLOPs", small=f"{size} texts", best="ascending")]
    caption = (
        f"{task.headline}, {task.direction}, of a target trained on so many texts of each method's last answer; means and 95% t intervals. "
        "FLOPs: what the method had spent before, once, and these texts. Sizes beyond the suite's own may cost more than its budget."
    )
    return [Table(f"{task.file_name}-sizes", f"{task.label}: by the number of deployment texts", caption, tuple(columns), tuple(body))]


def draw_sizes(results: SuiteResults) -> list[DrawnFigure]:
    """A figure for each task that was deployed at several sizes: the score over their number."""
    return [_drawn(task, points, results) for task in results.tasks if (points := points_of(task, results))]


def _drawn(task: TaskResults, points: dict[str, pd.DataFrame], results: SuiteResults) -> DrawnFigure:
    sizes = sorted({int(size) for rows in points.values() for size in rows[SIZE]})
    ends, unscored = [], []
    with canvas(3.4) as on:
        entries = []
        for label, rows in points.items():
            style = results.styles[label]
            scores = {size: _score(rows, size) for size in sizes}
            at = [size for size, score in scores.items() if np.isfinite(score.mean)]
            if not at:
                unscored.append(label)
                continue
            means = [scores[size].mean for size in at]
            on.axes.plot(at, means, linewidth=2.0, zorder=4, gid=on.mark(style), **line_look(style))
            for size in at:
                if np.isfinite(scores[size].low):
                    span = {"color": style.color, "linewidth": 1.2, "alpha": 0.6, "zorder": 3, "gid": on.mark(style)}
                    on.axes.plot([size] * 2, [scores[size].low, scores[size].high], **span)
            entries.append((Line2D([], [], linewidth=2.0, **line_look(style)), cut(label), style))
            ends.append((label, means[-1]))
        on.axes.set_xscale("log")
        on.axes.xaxis.set_major_locator(FixedLocator(sizes))
        on.axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        on.axes.xaxis.set_minor_locator(NullLocator())
        on.axes.set_xlabel("deployment texts (log scale)", labelpad=6)
        on.axes.set_ylabel(f"{cut(task.headline)} ({task.direction})", labelpad=6)
        on.title(f"{task.label}: how many texts")
        on.legend(entries, 2.9)
        decimals = decimals_for(mean for _, mean in ends)
        levels = and_more((f"{label} {number(mean, decimals)}" for label, mean in ends), limit=20)
        caption = "Means over seeds and 95% t intervals, by the number of texts of each method's last answer. The table has their costs."
        if unscored:
            caption += f" Without a finite mean: {and_more(unscored)}."
        alt = f"{task.label}: {task.headline} ({task.direction}) over the number of deployment texts. At the most: {levels or 'none'}."
        return on.drawn(f"{task.file_name}_sizes", alt, caption)


def _score(rows: pd.DataFrame, size: int) -> Interval:
    return mean_interval(rows.loc[rows[SIZE] == size, "value"])
