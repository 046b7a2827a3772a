"""What a text is truly worth to its dataset, and the policy gradient that pays for exactly that.

Retraining without each of N texts is dear, the metagradients tau of all texts are cheap, and the two are close. So the exact effects Delta
(`metagrad.leave_one_out`) of k texts, drawn uniformly, correct the metagradients of all:

    A_i = tau_i - c + [i drawn] (N / k) (Delta_i - tau_i)

E A_i over the draw is Delta_i - c, so the gradient of these advantages has exactly the mean of the leave-one-out estimator's, however wrong
tau is: tau is a control variate, and its error costs noise alone. c is a constant that a batch of its own gave, so it costs no bias.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dpgbench.metagrad import metagradients
from dpgbench.metagrad.leave_one_out import LeaveOneOut
from dpgbench.metagrad.optimizers import Optimizer
from dpgbench.metagrad.settings import DEFAULTS, EngineSettings
from dpgbench.metagrad.training import Signal


@dataclass(frozen=True)
class Worth:
    """One dataset's texts, in the texts' order: metagradients (N,), and the exact effects of some, by index. Both in units of Phi."""

    metagradients: Tensor
    effects: Mapping[int, float]

    def split_advantages(self, baseline: float) -> tuple[Tensor, Tensor]:
        """(tau - c, the error of tau): their difference is A. Each (N,).

        The gradient of the second has mean E g_tau - E g_exact, the bias of a policy gradient that is paid in metagradients.
        """
        error_N = torch.zeros_like(self.metagradients)
        for index, effect in self.effects.items():
            error_N[index] = len(error_N) / len(self.effects) * (self.metagradients[index] - effect)
        return self.metagradients - baseline, error_N


def worth(
    target: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    order: Tensor,
    signal: Signal,
    optimizer: Optimizer,
    left_out: Sequence[int],
    settings: EngineSettings = DEFAULTS,
) -> Worth:
    """Metagradients of all texts and leave-one-out effects of those at `left_out`, in float64.

    batches and order as `Differentiating.batches` gives them: order[i] is the text at place i of the concatenated batches. The target is
    left unchanged. Cost, in float64: a metagradient, 3FT more where a text is left out, and per text what `LeaveOneOut.effect` says.
    """
    settings = replace(settings, precision="full")
    double = copy.deepcopy(target).double()
    found = metagradients(double, batches, signal, optimizer, **settings.for_metagradients()).rewards.cpu()
    order = order.cpu()
    tau_N = torch.empty_like(found)
    tau_N[order] = found
    if not left_out:
        return Worth(tau_N, {})
    place = {text: index for index, text in enumerate(order.tolist())}
    run = LeaveOneOut(double, batches, signal, optimizer, settings)
    return Worth(tau_N, {text: run.effect(place[text]) for text in left_out})
