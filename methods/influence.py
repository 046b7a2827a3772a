"""GRPO on an influence estimate at the initial target instead of a metagradient (TracIn, arXiv 2002.08484; LESS, arXiv 2402.04333).

The reward of completion i is what one step from phi_0 on it alone would do to Phi, to first order:

    dot     <-grad l_i(phi_0), grad Phi(phi_0)>        the step is one of gradient descent (TracIn at one checkpoint)
    adam    <u_i, grad Phi(phi_0)>                     u_i the first update of the target's own optimizer (LESS)

With AdamW, u_i = -lr g_i / (sqrt(g_i^2 + eps_root) + eps), g_i = grad l_i(phi_0); with SGD, u_i = -lr g_i and the two agree up to lr.
Nothing is trained: no rewards for texts that are only good together, no T, and grad Phi is taken once per cell.
EK-FAC influence (arXiv 2308.03296), with an inverse curvature between the two gradients, is not here, for want of a library that takes our
metrics (looked at in November 2026). kronfluence 1.0.1 (July 2024, the latest) tracks Linear and Conv2d alone: of the tiny GPT-2, whose
layers are Conv1D, the head, 46,976 of 200,193 weights; and it reads Phi's gradient off the layers' outputs, which a metric of the weights
never passes. bergson 2.5.1 (October 2026) knows Conv1D and EK-FAC, but as a pipeline between folders, its own worker processes and
gradients of text losses: grad Phi would have to be written in its index format, for each step's texts anew.
Cost per step (F = one forward pass of the target on the completions): 3F, by a forward-mode product for dot and by per-text gradients
for adam; sampling; and 3 forward passes' worth of policy update. It fails where Phi's gradient at phi_0 points elsewhere than after T
steps, where a batch's optimizer step is unlike the steps of its texts (dot under AdamW), and, being blind to what the batch already
does, where a metric saturates or a text is one too many.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from dpgbench.api import Method, Options, Snapshot
from dpgbench.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from dpgbench.bench.grpo import Rollouts
    from dpgbench.bench.workbench import Workbench

ESTIMATORS = ("dot", "adam")


class Influence(Method):
    version = 3

    def __init__(self, options: Options):
        super().__init__(options)
        if options.estimator not in ESTIMATORS:
            raise UserError(f"method.estimator={options.estimator}: no such estimator; {did_you_mean(options.estimator, ESTIMATORS)}")

    def target_passes(self, steps: int) -> float:
        return 3.0

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        from dpgbench.bench.grpo import train_policy

        yield from train_policy(bench, partial(self.rewards, bench))

    def rewards(self, bench: Workbench, rollouts: Rollouts) -> Tensor:
        return bench.influences(rollouts.completions, optimizer_aware=self.options.estimator == "adam")
