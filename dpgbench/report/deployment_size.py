"""The second axis: the score against the number of deployment texts, for suites whose cells have `scale.more_deployments`.

A method that trains a policy pays for it once, however many texts it writes then; best of n pays n times for every text. Which is cheaper
therefore depends on how many texts are wanted. Rows with a size in `deployment_texts` are such points, of each cell's last answer.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from dpgbench.report.format import amount, and_more, decimals_for
from dpgbench.report.results import SuiteResults, TaskResults
from dpgbench.report.table import Cell, Column, Row, Table, text_cell
from dpgbench.report.task_tables import score_cell
from dpgbench.stats.over_seeds import Interval, mean_interval

SIZE = "deployment_texts"


def points_of(task: TaskResults, results: SuiteResults) -> dict[str, pd.DataFrame]:
    """Each method's points on a task by its label, in the order shown: cell, seed, deployment_texts, flops and the headline as `value`.

    Only of cells that have every size of their method: means of different seeds would be compared otherwise.
    """
    rows = results.deployments
    if rows.empty or task.finals.empty:
        return {}
    rows = rows[rows["cell"].isin(set(task.finals["cell"]))]  # of the cells that the task's other numbers are from
    column = task.headline if task.headline == "phi" else f"metric:{task.headline}"
    rows = rows.assign(value=rows[column] if column in rows.columns else np.nan).sort_values([SIZE, "seed"], kind="stable")
    kept = ["cell", "seed", SIZE, "flops", "value"]
    return {label: found[kept] for label in results.styles if len(found := _whole(rows[rows["method_label"] == label]))}


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.groupby("cell")[SIZE].transform("nunique") == rows[SIZE].nunique()]


def _incomplete(task: TaskResults, results: SuiteResults, points: dict[str, pd.DataFrame]) -> tuple[str, ...]:
    """What was left out for want of a size, a note a method."""
    rows = results.deployments[results.deployments["cell"].isin(set(task.finals["cell"]))]
    known = {cell for found in points.values() for cell in found["cell"]}
    missing = rows[~rows["cell"].isin(known)].drop_duplicates("cell")
    return tuple(
        f"{label}, seed {and_more(sorted(found['seed']))}: not deployed at every size and left out (result.json says why)."
        for label, found in missing.groupby("method_label")
    )


def size_tables(task: TaskResults, results: SuiteResults) -> list[Table]:
    """Methods x sizes: the mean score with its interval, and the mean cost. None where no cell was deployed at another size."""
    points = points_of(task, results)
    if not points:
        return []
    sizes = sorted({int(size) for rows in points.values() for size in rows[SIZE]})
    scores = {label: {size: score_of(rows, size) for size in sizes} for label, rows in points.items()}
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
    title, notes = f"{task.label}: by the number of deployment texts", _incomplete(task, results, points)
    return [Table(f"{task.file_name}-sizes", title, caption, tuple(columns), tuple(body), notes)]


def score_of(rows: pd.DataFrame, size: int) -> Interval:
    return mean_interval(rows.loc[rows[SIZE] == size, "value"])
