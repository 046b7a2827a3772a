"""Tasks about what the target writes, scored by any program: a plug-in gives the score of a text, the rest is here.

    class Questions(ScoreTask):
        headline = "questions"
        def scores(self, texts): return [text.count("?") for text in texts]
        def read(self, texts): return {"questions": sum(self.scores(texts)) / len(texts)}
        def hint(self): return "Ask questions."

Phi is `dpgbench.task_support.score_function`'s. Imports no torch at the top, as plug-ins with an `__init__` must not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dpgbench.api import Task
from dpgbench.core.options import Options
from dpgbench.plugins import contract
from dpgbench.task_support.score_function import Surrogate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dpgbench.worlds.world import World


class ScoreTask(Task):
    """Phi = E[score] of what the target writes by itself, or minus that with `goal: down`; options as `Surrogate` says.

    The YAML needs `name:` alone. Where a score reads several texts (`group`), `scores` gets them as one, one after the other.
    """

    defaults: ClassVar[dict[str, Any]] = {"goal": "up", "form": "ratio", "samples": 512, "fresh": 1024, "max_tokens": 24}

    def __init__(self, options: Options):
        super().__init__(options)
        file = contract.file_of(self)

        def scored(texts: Sequence[str]) -> list[float]:
            return contract.scores(file, "scores", contract.called(file, "scores", self.scores, texts), len(texts))

        def reading(texts: list[str]) -> dict[str, float]:
            return contract.readings(file, "read", contract.called(file, "read", self.read, texts))

        self.surrogate = Surrogate(options, scored, reading)
        self.higher_is_better = self.surrogate.up

    @abstractmethod
    def scores(self, texts: Sequence[str]) -> Sequence[float]:
        """The score of each text; it need not be differentiable, and is computed once per text."""

    @abstractmethod
    def read(self, texts: Sequence[str]) -> dict[str, float]:
        """What people read off fresh texts of the target, the headline among it."""

    def prepare(self, world: World) -> None:
        super().prepare(world)
        self.surrogate.prepare(world)

    def signal(self, model: nn.Module) -> Tensor:
        return self.surrogate.signal(model)

    def measure(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        return self.surrogate.measure(model)

    def rehearse(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        """Of some of phi_0's texts, which are there; writing fresh ones takes a second at scale tiny."""
        return self.surrogate.rehearse()

    def score(self, texts: Sequence[str]) -> list[float]:
        return self.surrogate.better(texts)

    def draw(self, model: nn.Module, texts: Sequence[str], axes) -> None:
        self.surrogate.draw(model, axes)
