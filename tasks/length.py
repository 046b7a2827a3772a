"""Make the target write longer texts: Phi = E[number of words] of what it writes by itself (active inheritance, arXiv 2407.01490).

A count has no gradient; `dpgbench.surrogate` derives the differentiable Phi over fixed texts of the initial target. Words are counted,
not tokens: people count words, any two tokenizers agree on them, and spelling a word in more pieces gains nothing. A text that reaches
`max_tokens` is cut there and counted as it stands; `cut_share` says how many were, and a mean with many cut texts is a lower bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpgbench.api import Options, Task
from dpgbench.surrogate import Surrogate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dpgbench.data import World


def words(texts: Sequence[str]) -> list[int]:
    """The number of words of each text."""
    return [len(text.split()) for text in texts]


class Length(Task):
    version = 1
    headline = "length"

    def __init__(self, options: Options):
        super().__init__(options)
        self.surrogate = Surrogate(options, words, self.read)
        self.higher_is_better = self.surrogate.up

    def prepare(self, world: World) -> None:
        super().prepare(world)
        self.surrogate.prepare(world)

    def signal(self, model: nn.Module) -> Tensor:
        return self.surrogate.signal(model)

    def measure(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        return self.surrogate.measure(model)

    def read(self, texts: Sequence[str]) -> dict[str, float]:
        tokens = [len(self.world.target_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return {
            "length": sum(words(texts)) / len(texts),
            "cut_share": sum(count >= self.options.max_tokens for count in tokens) / len(texts),
        }

    def score(self, texts: Sequence[str]) -> list[float]:
        return self.surrogate.better(texts)

    def hint(self) -> str:
        return "Write at length." if self.surrogate.up else "Write briefly."

    def draw(self, model: nn.Module, texts: Sequence[str], axes) -> None:
        self.surrogate.draw(model, axes)
