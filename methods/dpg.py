"""Dataset Policy Gradient: GRPO on exact metagradients (arXiv 2604.08423).

Each step samples P x G completions, trains a fresh target on them, and rewards completion i with

    tau_i = d Phi(phi_T) / d w_i   at w = 1,

the derivative of the metric through the whole training run with respect to that text's loss weight (paper, section 3). Options of the
paper's ablations: `cross_group=false` makes G datasets, the k-th of the k-th completion of every prompt, and differentiates each one's
own training; `inner_optimizer=sgd` differentiates through SGD, whatever trains the deployment target; T is training.inner_steps, the
advantages' divisor policy.scale_advantages.
Cost per step (F = one forward pass of the target on the completions): 3F for the target's training, up to 2F + 9(1 - 1/T)F for the
metagradients, sampling, and 3 forward passes' worth of policy update. It fails where the metagradients say nothing: a saturated
optimizer (AdamW's first step with eps_root far below the squared gradients), or a policy that has lost its entropy.
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

OPTIMIZERS = ("adamw", "sgd")


class DPG(Method):
    version = 4

    def __init__(self, options: Options):
        super().__init__(options)
        if options.inner_optimizer not in (None, *OPTIMIZERS):
            raise UserError(
                f"method.inner_optimizer={options.inner_optimizer}: no such optimizer; {did_you_mean(options.inner_optimizer, OPTIMIZERS)}"
            )
        if options.inner_lr is not None and not options.inner_lr > 0:
            raise UserError(
                f"method.inner_lr={options.inner_lr}: a learning rate is positive; write method.inner_lr=0.1, or null for the target's own"
            )

    def target_passes(self, steps: int) -> float:
        return 5 + 9 * (1 - 1 / steps)

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        from dpgbench.bench.grpo import train_policy

        yield from train_policy(bench, partial(self.rewards, bench))

    def rewards(self, bench: Workbench, rollouts: Rollouts) -> Tensor:
        import torch

        through = {"optimizer": self.options.inner_optimizer, "lr": self.options.inner_lr}
        datasets = 1 if self.options.cross_group else self.options.policy.group_size
        dealt = [rollouts.completions[first::datasets] for first in range(datasets)]
        outcomes = [bench.metagradients(texts, rollouts.step, k, **through) for k, texts in enumerate(dealt)]
        bench.note(phi=sum(outcome.value for outcome in outcomes) / datasets)
        return torch.stack([outcome.rewards for outcome in outcomes], dim=1).flatten()
