"""dpgbench: Dataset Policy Gradient beside the alternatives a practitioner would weigh, under one budget accounting."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from pandas import DataFrame

__version__ = "0.1.0"


def load(name: str | Path, *, snapshots: bool = False, results: str | Path | None = None) -> DataFrame:
    """The scores of a suite's finished cells as a tidy frame: a row per cell, or per snapshot of a cell.

    `name` is a suite whose `NAME.parquet` lies in `results` (by default `./results`, then the clone's own), or the path of such a file.

    | column | what |
    |---|---|
    | task, method | labels, as on the report's page |
    | role | "method"; "base", the untouched generator; "oracle", the 1 of the normalised scale, which does not compete |
    | seed | methods pair by it |
    | score, headline, higher_is_better | the task's headline at that snapshot, its name and direction |
    | normalised | (score - mean of base) / (mean of the oracle, or the best final mean - mean of base); NaN where that is undefined |
    | phi | the differentiable metric, higher is better |
    | step, final | which snapshot (a training step, a round, ...), and whether it is the cell's last; without `snapshots` all are |
    | flops, tokens_generated, tokens_trained, seconds | what the method was charged until then, this snapshot's dataset included |
    | cell | the run folder's name |
    | metric:NAME | every other measure of the tasks; NaN where a task has it not |

    UserError, one line, where there is no such suite or file, or where the file is not one of dpgbench's.
    """
    from dpgbench.report.data import tidy

    return tidy(name, snapshots, results)


def figure(name: str | Path, kind: str = "budget", *, task: str | None = None, results: str | Path | None = None) -> Figure:
    """A figure of the report as a matplotlib object, to be changed and saved as you like (`figure.axes[0]`, `figure.savefig`).

    `kind` is "budget" (what a budget buys, over all tasks), "ranks" or "profile"; or, with `task`, "flops" (its score against FLOPs) or
    "final" (where every method ended). `name` and `results` as in `load`. The first three compute the bootstrap bands of all methods
    anew, half a minute for a suite of 500 cells; the other two take seconds. UserError, one line, for anything that is not there.
    """
    from dpgbench.report.data import draw

    return draw(name, kind, task, results)
