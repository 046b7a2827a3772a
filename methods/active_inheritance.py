"""Active inheritance: best of n completions per prompt by a black-box score of each text (arXiv 2407.01490).

For every prompt of the deployment dataset, n completions are drawn and the best is kept. The score is the task's own (`Task.score`),
or, where a task has none, the one-step utility: Phi of a fresh target after one optimizer step on that text alone. Nothing is
trained, so n is the compute knob. Cost: n times the sampling, and for the utility n times 3F per text. It fails where the wanted
text is rarer than one in n, and where texts are only good together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dpgbench.api import Method, Options, Prompt, Snapshot, TaskInfo
from dpgbench.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from dpgbench.workbench import Workbench

CRITERIA = ("auto", "score", "utility")


class ActiveInheritance(Method):
    def __init__(self, options: Options):
        super().__init__(options)
        if options.n < 1:
            raise UserError(f"method.n={options.n}: best of n needs at least one completion per prompt; write n=4")
        if options.criterion not in CRITERIA:
            raise UserError(f"method.criterion={options.criterion}: no such criterion; {did_you_mean(options.criterion, CRITERIA)}")

    def supports(self, task: TaskInfo) -> str | None:
        if self.options.criterion == "score" and "score" not in task.defines:
            return f"{task.name} has no black-box score of a text; use method.criterion=utility"

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        n = self.options.n

        def best_of_n(prompts: Sequence[Prompt]) -> list[str]:
            candidates = bench.sample([prompt for prompt in prompts for _ in range(n)], "deployment", n)
            values = self._values(bench, candidates)
            return [candidates[max(range(first, first + n), key=values.__getitem__)] for first in range(0, len(candidates), n)]

        yield Snapshot(step=n, sample=best_of_n)

    def _values(self, bench: Workbench, texts: list[str]) -> list[float]:
        if self.options.criterion != "utility":
            scores = bench.task.score(texts)
            if scores is not None:
                return scores
        return bench.one_step_utilities(texts)
