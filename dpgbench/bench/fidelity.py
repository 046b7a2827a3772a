"""What a text is truly worth to its dataset, and the policy gradient that pays for exactly that.

Retraining without each of N texts is dear, the metagradients tau of all texts are cheap, and the two are close. So the exact effects Delta
(`metagrad.leave_one_out`) of k texts, drawn uniformly, correct the metagradients of all:

    A_i = tau_i - c + [i drawn] (N / k) (Delta_i - tau_i)

E A_i over the draw is Delta_i - c, so the gradient of these advantages has exactly the mean of the leave-one-out estimator's, however wrong
tau is: tau is a control variate, and its error costs noise alone. c is a constant that a batch of its own gave, so it costs no bias.
tau is what a method trains with, in the cell's own precision.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dpgbench.metagrad.leave_one_out import LeaveOneOut
from dpgbench.metagrad.optimizers import Optimizer
from dpgbench.metagrad.settings import DEFAULTS, EngineSettings
from dpgbench.metagrad.training import Signal


@dataclass(frozen=True)
class Worth:
    """What is known of one dataset's texts, in the texts' order, in units of Phi."""

    metagradients: Tensor
    """tau, (N,) float64."""
    effects: Mapping[int, float]
    """Delta of the texts that were drawn, by index."""

    def split_advantages(self, baseline: float) -> tuple[Tensor, Tensor]:
        """(tau - c, the error of tau): their difference is A. Each (N,).

        The gradient of the second has mean E g_tau - E g_exact, the bias of a policy gradient that is paid in metagradients.
        """
        error_N = torch.zeros_like(self.metagradients)
        for index, effect in self.effects.items():
            error_N[index] = len(error_N) / len(self.effects) * (self.metagradients[index] - effect)
        return self.metagradients - baseline, error_N


def exact_effects(
    target: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    order: Tensor,
    signal: Signal,
    optimizer: Optimizer,
    left_out: Sequence[int],
    settings: EngineSettings = DEFAULTS,
) -> dict[int, float]:
    """The leave-one-out effects of the texts at `left_out`, in float64 whatever the target's precision: they may be below its rounding.

    batches and order as `Differentiating.batches` gives them: order[i] is the text at place i of the concatenated batches. The target is
    left unchanged. Cost, in float64: 3FT, and per text what `LeaveOneOut.effect` says. Raises ValueError on malformed input.
    """
    place = {text: index for index, text in enumerate(order.tolist())}
    run = LeaveOneOut(copy.deepcopy(target).double(), batches, signal, optimizer, replace(settings, precision="full"))
    return {text: run.effect(place[text]) for text in left_out}
