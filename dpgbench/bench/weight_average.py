"""A policy's deployment texts come from a running mean of its weights, where one is asked for (`policy.averaging`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from dpgbench.metagrad.training import loaded
from dpgbench.worlds.adapters import trained


class WeightAverage:
    """A running mean of the generator's weights, from which its deployment texts are drawn (Polyak and Juditsky, 1992).

        mean_t = d_t mean_{t-1} + (1 - d_t) theta_t,   d_t = min(decay, t / (t + 9))

    Rollouts come from theta itself. A policy that circles around its optimum has an average nearer to it. `decay=0` is no averaging and
    costs nothing; otherwise one copy of the trained weights. The growing d_t lets the first steps count little in a long run.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.mean = {name: weight.detach().clone() for name, weight in trained(model).items()} if decay else None

    def update(self, step: int) -> None:
        if self.mean is not None:
            keep = min(self.decay, step / (step + 9))
            for name, weight in trained(self.model).items():
                self.mean[name].lerp_(weight.detach(), 1 - keep)

    def weights(self) -> dict[str, Tensor]:
        """What texts are drawn from."""
        return dict(trained(self.model)) if self.mean is None else self.mean

    def loaded(self) -> AbstractContextManager:
        return nullcontext() if self.mean is None else loaded(self.model, self.mean)
