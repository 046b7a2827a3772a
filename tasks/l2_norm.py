"""Make the LM head's weights smaller: Phi = -||W_T||_2, W the LM head after training (arXiv 2604.08423, section 4).

A weight target without any hint in the text: whatever training text happens to shrink the head is right.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dpgbench.api import Task
from dpgbench.data import World


class L2Norm(Task):
    headline = "norm_change"
    higher_is_better = False

    def prepare(self, world: World) -> None:
        super().prepare(world)
        self.initial_norm = world.target.get_output_embeddings().weight.detach().norm().item()

    def signal(self, model: nn.Module) -> Tensor:
        return -model.get_output_embeddings().weight.norm()

    def measure(self, model: nn.Module, texts: Sequence[str]) -> dict[str, float]:
        norm = model.get_output_embeddings().weight.detach().norm().item()
        return {"norm": norm, "norm_change": norm - self.initial_norm, "norm_change_relative": norm / self.initial_norm - 1}
