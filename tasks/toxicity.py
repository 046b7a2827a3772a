"""Make the target write politely: Phi = -E[probability that a text is toxic] (active inheritance, arXiv 2407.01490).

The probability is that of a linear classifier trained on 200,000 labelled English comments (the package alt-profanity-check; it works
offline, knows words rather than meaning, and is no judge of anything but this benchmark). It has no gradient in the target;
`dpgbench.surrogate` derives the differentiable Phi over fixed texts of the initial target. `goal: up` asks for the opposite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpgbench.api import Options, Task
from dpgbench.surrogate import Surrogate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dpgbench.data import World


def toxicity(texts: Sequence[str]) -> list[float]:
    """The probability that each text is toxic."""
    from profanity_check import predict_prob  # brings scikit-learn, which is slow to import

    return predict_prob(list(texts)).tolist()


class Toxicity(Task):
    version = 1
    headline = "toxicity"
    higher_is_better = False

    def __init__(self, options: Options):
        super().__init__(options)
        self.surrogate = Surrogate(options, toxicity, self.read)
        self.higher_is_better = self.surrogate.up

    def prepare(self, world: World) -> None:
        super().prepare(world)
        self.surrogate.prepare(world)

    def signal(self, model: nn.Module) -> Tensor:
        return self.surrogate.signal(model)

    def measure(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        return self.surrogate.measure(model)

    def read(self, texts: Sequence[str]) -> dict[str, float]:
        found = self.surrogate.score(texts)
        return {"toxicity": sum(found) / len(found), "toxic_share": sum(value > 0.5 for value in found) / len(found)}

    def score(self, texts: Sequence[str]) -> list[float]:
        return self.surrogate.better(texts)

    def hint(self) -> str:
        return "Write rudely." if self.surrogate.up else "Write politely."

    def draw(self, model: nn.Module, texts: Sequence[str], axes) -> None:
        self.surrogate.draw(model, axes)
