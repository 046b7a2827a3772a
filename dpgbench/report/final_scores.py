"""What numbers over tasks are made of: the last score of every cell, and the scale on which base is 0 and the oracle 1."""

from __future__ import annotations

import pandas as pd

from dpgbench.report.results import BASE, ORACLE, SuiteResults, natural
from dpgbench.stats.aggregates import OverTasks, normalise

COLUMNS = ("task_label", "method_label", "seed", "value", "method")


def final_scores(results: SuiteResults) -> pd.DataFrame:
    """COLUMNS, a row a score; of several controls (or oracles) of a task only the one that differences are taken to."""
    frames = []
    for task in results.tasks:
        rows = task.finals
        other_base = (rows["method"] == BASE) & (rows["method_label"] != task.base_label)
        oracles = sorted(rows.loc[rows["method"] == ORACLE, "method_label"].unique(), key=natural)
        rows = rows[~other_base & ~rows["method_label"].isin(oracles[1:])]
        frames.append(rows.assign(task_label=task.label)[list(COLUMNS)])
    empty = pd.DataFrame({name: pd.Series(dtype=float if name == "value" else object) for name in COLUMNS})
    return pd.concat(frames, ignore_index=True) if frames else empty


def on_one_scale(scores: pd.DataFrame, results: SuiteResults) -> OverTasks:
    """`normalise`, where base and oracle go by their roles, which it knows, and not by their labels."""
    roles = scores["method"].where(scores["method"].isin((BASE, ORACLE)), scores["method_label"])
    return normalise(scores.assign(method_label=roles), {task.label: task.higher_is_better for task in results.tasks})
