"""Stored results for people, behind `dpgbench.load` and `dpgbench.figure`: a tidy frame of scores, and the report's figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from dpgbench.core.errors import UserError, did_you_mean
from dpgbench.core.paths import home
from dpgbench.report.final_scores import final_scores, on_one_scale
from dpgbench.report.results import BASE, ORACLE, SuiteResults, read_frame
from dpgbench.store.parquet import read_parquet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "task", "method", "role", "seed", "score", "headline", "higher_is_better", "normalised", "phi", "step", "final",
    "flops", "tokens_generated", "tokens_trained", "seconds", "cell",
)  # fmt: skip
OVER_TASKS, OF_A_TASK = ("budget", "ranks", "profile"), ("flops", "final")


def read_suite(name: str | Path, results: str | Path | None = None) -> SuiteResults:
    """What is stored of a suite, or in a parquet file. UserError where there is none, or where it is not one of ours."""
    path = _parquet(str(name), results)
    frame, about = read_parquet(path)
    try:
        return read_frame(frame, about["suite"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: {error}; run `report` where its run folders are") from None


def tidy(name: str | Path, snapshots: bool, results: str | Path | None) -> pd.DataFrame:
    """As documented at `dpgbench.load`."""
    found = read_suite(name, results)
    anchors = on_one_scale(final_scores(found), found).anchors
    frames = []
    for task in found.tasks:
        last = set(zip(task.finals["cell"], task.finals["step"], strict=True))
        rows = task.snapshots if snapshots else task.finals
        scale = anchors.get(task.label)
        scaled = scale is not None and not scale.why_undefined
        frames.append(
            rows.assign(
                task=task.label,
                method=rows["method_label"],
                role=rows["method"].where(rows["method"].isin((BASE, ORACLE)), "method"),
                score=rows["value"],
                headline=task.headline,
                higher_is_better=task.higher_is_better,
                normalised=(rows["value"] - scale.base) / (scale.ceiling - scale.base) if scaled else np.nan,
                final=[key in last for key in zip(rows["cell"], rows["step"], strict=True)],
            )
        )
    if not frames:
        return pd.DataFrame(columns=list(COLUMNS))
    frame = pd.concat(frames, ignore_index=True)
    measures = sorted(column for column in frame.columns if column.startswith("metric:"))
    return frame[[*COLUMNS, *measures]].astype({"final": bool, "higher_is_better": bool, "step": int})


def draw(name: str | Path, kind: str, task: str | None, results: str | Path | None) -> Figure:
    """As documented at `dpgbench.figure`."""
    if kind not in (*OVER_TASKS, *OF_A_TASK):
        raise UserError(f"kind={kind!r}: there is no such figure; {did_you_mean(kind, (*OVER_TASKS, *OF_A_TASK))}")
    if (kind in OF_A_TASK) != (task is not None):
        needs = "is of one task: add task=..." if task is None else "is over all tasks: leave task out"
        raise UserError(f"kind={kind!r} {needs}")
    found = read_suite(name, results)
    if kind in OVER_TASKS:
        from dpgbench.report.over_tasks import compute_across
        from dpgbench.report.summary_figures import draw_summary_figures

        drawn = {figure.file_name: figure for figure in draw_summary_figures(found, compute_across(found))}.get(f"summary_{kind}")
        nothing = "no method has a score on every task"
    else:
        from dpgbench.report.task_figures import draw_endings, draw_over_flops, has_scores
        from dpgbench.report.task_tables import method_rows

        chosen = next((each for each in found.tasks if each.label == task), None)
        if chosen is None:
            raise UserError(
                f"task={task!r}: {found.name} has no such task; {did_you_mean(str(task), [each.label for each in found.tasks])}"
            )
        nothing = "no finished cell of this task has a finite score"
        drawn = None
        if has_scores(chosen):
            drawn = draw_over_flops(chosen, found.styles) if kind == "flops" else draw_endings(chosen, found.styles, method_rows(chosen))
    if drawn is None:
        raise UserError(f"kind={kind!r}: nothing to draw for {found.name}: {nothing}")
    return drawn.figure


def _parquet(name: str, results: str | Path | None) -> Path:
    if name.endswith(".parquet"):
        if not Path(name).is_file():
            raise UserError(f"{name}: there is no such file; give a suite's name or an existing parquet")
        return Path(name)
    folders = [Path(results)] if results is not None else [Path("results"), home() / "results"]
    for folder in folders:
        if (folder / f"{name}.parquet").is_file():
            return folder / f"{name}.parquet"
    stored = {file.stem for folder in folders for file in folder.glob("*.parquet")}
    raise UserError(f"suite {name!r}: there is no {folders[0] / f'{name}.parquet'}; {did_you_mean(name, stored)}")
