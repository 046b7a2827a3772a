"""GRPO on the task's own score of each text, its similarity to what is wanted: no target is trained (arXiv 2604.08423, baselines).

The reward of completion i is Task.score(x_i): for `uuid` the Levenshtein similarity to the string, 1 - distance / the longer length
(rapidfuzz); for `language` 1 in the language and 0 in any other; elsewhere whatever a task defines. One file for all of them, because a
task knows what its texts should look like and people read the same score: best of n picks by it as well, so that the two methods
differ in how they use a reward and not in the reward.
Cost per step: sampling and 3 forward passes' worth of policy update; a score runs no model, so it costs seconds and no FLOPs. It fails
where the wanted text does not occur among the completions (all scores of a group are equal: no signal), where a score is fooled (one
word of the language, over and over), and says nothing of what training on the texts does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpgbench.api import Method, Snapshot, TaskInfo

if TYPE_CHECKING:
    from dpgbench.workbench import Workbench


class Similarity(Method):
    def supports(self, task: TaskInfo) -> str | None:
        if "score" not in task.defines:
            return f"{task.name} has no black-box score of a text, so no text is known to be like what is wanted"

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        from dpgbench.policy import Rollouts, train_policy

        def scores(rollouts: Rollouts) -> list[float]:
            return bench.scores(rollouts.completions)

        yield from train_policy(bench, scores)
