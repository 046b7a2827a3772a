"""Dataset Policy Gradient: GRPO on exact metagradients (arXiv 2604.08423).

Each step samples P x G completions, trains a fresh target on them, and rewards completion i with

    tau_i = d Phi(phi_T) / d w_i   at w = 1,

the derivative of the metric through the whole training run with respect to that text's loss weight (paper, section 3).
Cost per step (F = one forward pass of the target on the completions): 3TF for the target's training, 3F + 8(T-1)F for the
metagradients, sampling, and 3 forward passes' worth of policy update. It fails where the metagradients say nothing: a saturated
optimizer (AdamW's first step with eps_root far below the squared gradients), or a policy that has lost its entropy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dpgbench.api import Method, Snapshot

if TYPE_CHECKING:
    from dpgbench.workbench import Workbench


class DPG(Method):
    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        from dpgbench.policy import Rollouts, train_policy

        def metagradient_rewards(rollouts: Rollouts):
            return bench.metagradients(rollouts.completions, rollouts.step).rewards

        yield from train_policy(bench, metagradient_rewards)
