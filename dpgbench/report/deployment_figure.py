"""The figure beside the tables of `deployment_size`: the score over the number of deployment texts."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from dpgbench.report.deployment_size import SIZE, points_of, score_of
from dpgbench.report.format import and_more, decimals_for, number
from dpgbench.report.plot_style import DrawnFigure, canvas, cut, line_look
from dpgbench.report.results import SuiteResults, TaskResults


def draw_sizes(task: TaskResults, results: SuiteResults) -> list[DrawnFigure]:
    """The score over the number of texts, where the task was deployed at several sizes; no figure elsewhere."""
    points = points_of(task, results)
    return [_drawn(task, points, results)] if points else []


def _drawn(task: TaskResults, points: dict[str, pd.DataFrame], results: SuiteResults) -> DrawnFigure:
    sizes = sorted({int(size) for rows in points.values() for size in rows[SIZE]})
    ends, unscored = [], []
    with canvas(3.4) as on:
        entries = []
        for label, rows in points.items():
            style = results.styles[label]
            scores = {size: score_of(rows, size) for size in sizes}
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
