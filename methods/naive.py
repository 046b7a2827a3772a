"""GRPO on the Phi of whole datasets: a text is paid what a target trained on its dataset reached (arXiv 2604.08423, naive reward).

A step's completions are dealt into D datasets, the k-th of them made of the k-th completions of every prompt. A fresh target is trained
on each, and a text's reward is its dataset's Phi(phi_T). The advantage compares datasets:

    A_i = (Phi_{d(i)} - mean_d Phi_d) / std_d Phi_d

D divides the group size, so every prompt's group contains each dataset equally often. The mean and the spread of a group are then those of
the datasets, so GRPO's ordinary advantage is the formula above, and each dataset is a sample of what the policy writes.
Where ours differs from the authors': they give the targets behind this reward a learning rate of their own (AdamW on sixseven 2.56e-4 where
metagradients run at 5e-6, on language and uuid 6.4e-5 instead of 1e-6, on l2_norm 1e-6). Here it is `training.lr`, as at deployment,
unless `target_lr` says otherwise; the deployment target keeps `training.lr` either way.
Cost per step (F = one forward pass of the target on all completions): 3F for T steps on each dataset, D times Phi, sampling, and 3
forward passes' worth of policy update. It fails by its noise: a text hears D numbers that it shares with all others of its dataset, so
the signal of one text drowns as completions / D grows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from dpgbench.api import Method, Options, Snapshot
from dpgbench.core.errors import UserError

if TYPE_CHECKING:
    from dpgbench.bench.grpo import Rollouts
    from dpgbench.bench.workbench import Workbench


class Naive(Method):
    version = 3

    def __init__(self, options: Options):
        super().__init__(options)
        group = options.policy.group_size
        self.datasets = group if options.datasets is None else options.datasets
        if not isinstance(self.datasets, int) or self.datasets < 2 or group % self.datasets:
            raise UserError(
                f"method.datasets={options.datasets}: 2 or more, and must divide policy.group_size={group}; "
                f"write datasets=null for {group}, or raise group_size"
            )
        if options.target_lr is not None and not options.target_lr > 0:
            raise UserError(
                f"method.target_lr={options.target_lr}: a learning rate is positive; write method.target_lr=1e-3, or null for training.lr"
            )

    def target_passes(self, steps: int) -> float:
        return 3.0

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        from dpgbench.bench.grpo import train_policy

        yield from train_policy(bench, partial(self.rewards, bench))

    def rewards(self, bench: Workbench, rollouts: Rollouts) -> list[float]:
        dealt = [rollouts.completions[first :: self.datasets] for first in range(self.datasets)]
        values = [bench.dataset_value(texts, rollouts.step, index, lr=self.options.target_lr) for index, texts in enumerate(dealt)]
        bench.note(phi=sum(values) / len(values))
        return [values[place % self.datasets] for place in range(len(rollouts.completions))]
