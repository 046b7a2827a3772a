"""Write "67" into the LM head's weights: the signs of a 6x7 patch of the change dW = W_T - W_0 (arXiv 2604.08423, section 4).

With W the LM head as (hidden, vocabulary), S the picture below and k the strength, Phi = -mean softplus(-k S dW[patch]). People read
the pixel accuracy mean(sign(dW) == S) and look at the decoded picture. The patch's corner is an option: columns are tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpgbench.api import Task
from dpgbench.data import World
from dpgbench.errors import UserError

PICTURE = """
####---
---###-
-#####-
---###-
-#-###-
---####
"""


class SixSeven(Task):
    headline = "pixel_accuracy"

    def prepare(self, world: World) -> None:
        super().prepare(world)
        rows = PICTURE.split()
        self.signs = torch.tensor([[1.0 if pixel == "#" else -1.0 for pixel in row] for row in rows], device=world.target.device)
        (row, column), (height, width) = self.options.corner, self.signs.shape
        self.window = slice(row, row + height), slice(column, column + width)
        head = world.target.get_output_embeddings().weight.detach().T
        if row < 0 or column < 0 or row + height > head.shape[0] or column + width > head.shape[1]:
            raise UserError(
                f"task.corner=[{row},{column}]: a {height}x{width} patch does not fit into the {head.shape[0]}x{head.shape[1]} LM head; "
                f"write task.corner=[0,0]"
            )
        self.initial = head[self.window].clone()

    def change(self, model: nn.Module) -> Tensor:
        """dW in the patch, (6, 7)."""
        return model.get_output_embeddings().weight.T[self.window] - self.initial

    def signal(self, model: nn.Module) -> Tensor:
        return -nn.functional.softplus(-self.options.strength * self.signs * self.change(model)).mean()

    def measure(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        right = self.change(model).sign() == self.signs
        return {"pixel_accuracy": right.float().mean().item(), "wrong_pixels": float((~right).sum())}

    def draw(self, model: nn.Module, texts: Sequence[str], axes) -> None:
        """Lit where the weight grew; a cross marks a wrong pixel."""
        decoded = self.change(model).sign()
        axes.imshow(decoded.detach().cpu().numpy(), cmap="gray_r", vmin=-1, vmax=1)
        for row, column in (decoded != self.signs).nonzero().tolist():
            axes.plot(column, row, marker="x", color="#d55e00", markersize=9, markeredgewidth=2)
        axes.set_axis_off()
