"""Best of n: several completions of each prompt, of which the one with the highest value is kept.

    x*(q) = argmax_{k <= n} s(x_k),    x_k ~ pi_theta(. | q)

s is the task's black-box score (`Task.score`) or, where a task has none, the one-step utility: Phi of a fresh target after one optimizer
step on that text alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpgbench.core.plugin_types import Prompt

if TYPE_CHECKING:
    from dpgbench.bench.workbench import Workbench

CRITERIA = ("auto", "score", "utility")
"""What values are: the score where there is one and else the utility; or one of the two."""


class Candidates:
    """Completions and their values. Whoever takes more than were taken before shares those, and is charged for all that it takes.

    `names` are those of the draws (`Drawing.shared_draws`). Cost of best of n: the sampling of n completions a prompt, and for the utility
    3F a text (F = one forward pass of the target on it) and one Phi.
    """

    def __init__(self, bench: Workbench, criterion: str, *names: object):
        self.bench, self.criterion = bench, criterion
        self.draws = bench.shared_draws(*names)  # of which `base` has the first
        self.texts: list[str] = []
        self.values: list[float] = []
        self.seconds = 0.0  # what judging them took

    def best(self, prompts: Sequence[Prompt], n: int) -> tuple[list[str], list[float]]:
        """Each prompt's best text of n and its value, the first of equals. Of the same draws a smaller n has the first."""
        texts = [text for draw in self.draws.first(n, prompts) for text in draw]
        values = self._judged(texts)
        best = [max(range(place, len(texts), len(prompts)), key=values.__getitem__) for place in range(len(prompts))]
        return [texts[index] for index in best], [values[index] for index in best]

    def _judged(self, texts: list[str]) -> list[float]:
        """Values of these texts. Those that were judged before, or the first of them, are at hand; they are charged all the same."""
        shared = min(len(texts), len(self.texts))
        if texts[:shared] != self.texts[:shared]:
            self.texts, self.values, self.seconds, shared = [], [], 0.0, 0
        share = shared / len(self.texts) if self.texts else 0.0
        self.bench.account.again(share * self.seconds)
        clock = time.perf_counter()
        values = self._values_of(texts, self.values[:shared])
        if len(texts) > len(self.texts):
            self.texts, self.values = texts, values
            self.seconds += time.perf_counter() - clock
        return values

    def _values_of(self, texts: list[str], known: list[float]) -> list[float]:
        if self.criterion != "utility":
            scores = self.bench.task.score(texts[len(known) :])
            if scores is not None:
                return [*known, *scores]
        return self.bench.one_step_utilities(texts, known=known)
