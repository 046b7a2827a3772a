"""Write "67" into the LM head's weights: the signs of a 6x7 patch of the change dW = W_T - W_0 (arXiv 2604.08423, section 4).

With W the LM head as (hidden, vocabulary), S the picture below and k the strength, Phi = -mean softplus(-k S dW[patch]). People read
the pixel accuracy mean(sign(dW) == S) and look at the decoded picture. The patch's corner is an option: columns are tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dpgbench.api import Task
from dpgbench.task_support.weight_picture import Patch
from dpgbench.worlds.world import World

PICTURE = """
####---
---###-
-#####-
---###-
-#-###-
---####
"""


class SixSeven(Task):
    version = 1
    headline = "pixel_accuracy"

    def prepare(self, world: World) -> None:
        super().prepare(world)
        self.patch = Patch(PICTURE.split(), self.options.corner, self.options.strength, world.target)

    def signal(self, model: nn.Module) -> Tensor:
        return self.patch.signal(model)

    def measure(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        return self.patch.measure(model)

    def hint(self) -> str:
        return "Write text that draws the number 67 into a language model's weights when it is trained on it."

    def draw(self, model: nn.Module, texts: Sequence[str], axes) -> None:
        """Black where the weight grew; a cross marks a wrong pixel."""
        self.patch.draw(model, axes)
