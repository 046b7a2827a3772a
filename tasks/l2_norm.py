"""Make the LM head's weights smaller: Phi = -||W_T||_2, W the LM head after training (arXiv 2604.08423, section 4).

A weight target without any hint in the text: whatever training text happens to shrink the head is right.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dpgbench.api import Task
from dpgbench.worlds.world import World


class L2Norm(Task):
    version = 1
    headline = "norm_change"
    higher_is_better = False

    def prepare(self, world: World) -> None:
        super().prepare(world)
        self.initial = world.target.get_output_embeddings().weight.detach().clone()
        self.initial_norm = self.initial.double().norm().item()

    def signal(self, model: nn.Module) -> Tensor:
        return -model.get_output_embeddings().weight.norm()

    def measure(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        norm = model.get_output_embeddings().weight.detach().double().norm().item()  # a float32 norm is 3% of a large model's change
        return {"norm": norm, "norm_change": norm - self.initial_norm, "norm_change_relative": norm / self.initial_norm - 1}

    def hint(self) -> str:
        return "Write text that makes a language model's weights smaller when it is trained on it."

    def draw(self, model: nn.Module, texts: Sequence[str], axes) -> None:
        """How the norm of each token's row changed: a histogram, and the share of rows that shrank."""
        before, after = (weight.detach().norm(dim=1).cpu() for weight in (self.initial, model.get_output_embeddings().weight))
        change = (after / before - 1)[before > 0].numpy()  # a padding token's row may be zero
        axes.hist(change, bins=40, color="#0072b2")
        axes.axvline(0, ymin=0.13, color="black", linewidth=1)
        axes.set_ylim(bottom=-0.15 * axes.get_ylim()[1])
        edges = {"left": change.min(), "right": change.max()}
        for side, edge in edges.items():
            axes.text(edge, 0, f"{edge:+.2%}", fontsize=7, ha=side, va="top")
        axes.text(0.5, 0, f"{(change < 0).mean():.0%} of tokens shrank", fontsize=9, ha="center", transform=axes.transAxes)
        axes.set_axis_off()
