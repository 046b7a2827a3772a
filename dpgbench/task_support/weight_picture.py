"""A picture in the signs of a weight change: what the tasks that paint into the LM head share (arXiv 2604.08423, section 4).

With W the LM head as (hidden, vocabulary), dW = W_T - W_0 in a window of W, S the picture as +1 and -1, and k the strength,
Phi = -mean softplus(-k S dW). A pixel is lit where its weight grew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dpgbench.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WRONG = "#d55e00"  # the vermilion of the colour-blind safe palette (Okabe and Ito)


class Patch:
    """A picture, given as rows of "#" (lit, +1) and "-" (dark, -1), in the window of the LM head whose upper left corner is `corner`.

    Made once, of the initial target: it remembers W_0 in the window. Raises UserError if the picture does not fit into the head.
    """

    def __init__(self, rows: Sequence[str], corner: Sequence[int], strength: float, target: nn.Module):
        initial = target.get_output_embeddings().weight.detach().T
        self.signs = torch.tensor([[1.0 if pixel == "#" else -1.0 for pixel in row] for row in rows], device=initial.device)
        self.strength = strength
        (row, column), (height, width) = corner, self.signs.shape
        if row < 0 or column < 0 or row + height > initial.shape[0] or column + width > initial.shape[1]:
            raise UserError(
                f"task.corner=[{row},{column}]: a {height}x{width} patch does not fit into the {initial.shape[0]}x{initial.shape[1]} "
                f"LM head; write task.corner=[0,0]"
            )
        self.window = slice(row, row + height), slice(column, column + width)
        self.initial = initial[self.window].clone()

    def change(self, model: nn.Module) -> Tensor:
        """dW in the window, (height, width)."""
        return model.get_output_embeddings().weight.T[self.window] - self.initial

    def signal(self, model: nn.Module) -> Tensor:
        """Phi, a scalar."""
        return -nn.functional.softplus(-self.strength * self.signs * self.change(model)).mean()

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The share of pixels with the right sign, and how many have the wrong one; a weight that did not move is wrong."""
        right = self.change(model).sign() == self.signs
        return {"pixel_accuracy": right.float().mean().item(), "wrong_pixels": float((~right).sum())}

    def decoded(self, model: nn.Module) -> list[str]:
        """The picture in the signs of dW, as rows of "#" and "-"."""
        return ["".join("#" if grew else "-" for grew in row) for row in (self.change(model) > 0).tolist()]

    def draw(self, model: nn.Module, axes: Axes) -> None:
        """Black where the weight grew; a cross marks a wrong pixel."""
        decoded = self.change(model).sign()
        axes.imshow(decoded.detach().cpu().numpy(), cmap="gray_r", vmin=-1, vmax=1)
        size = 63 / decoded.shape[1]  # in points: the same share of a pixel, however many there are
        for row, column in (decoded != self.signs).nonzero().tolist():
            axes.plot(column, row, marker="x", color=WRONG, markersize=size, markeredgewidth=size / 4.5)
        axes.set_axis_off()
