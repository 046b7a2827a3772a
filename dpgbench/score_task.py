"""The base of tasks about what the target writes, where users import it from: see `dpgbench.task_support.score_task`."""

from dpgbench.task_support.score_task import ScoreTask

__all__ = ["ScoreTask"]
