"""GRPO on the Phi of whole datasets: a text is paid what a target trained on its dataset reached (arXiv 2604.08423, naive reward).

A step's completions are dealt into D datasets, the k-th of them made of the k-th completions of every prompt. A fresh target is trained
on each, and a text's reward is its dataset's Phi(phi_T). The advantage compares datasets:

    A_i = (Phi_{d(i)} - mean_d Phi_d) / std_d Phi_d

D divides the group size, so that every prompt's group holds each dataset equally often: the group's mean is the mean over datasets and
its spread theirs, GRPO's ordinary advantage is the one above, and each dataset is a sample of what the policy writes.
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

    def target_passes(self, steps: int) -> float:
        return 3.0

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        from dpgbench.bench.grpo import train_policy

        yield from train_policy(bench, partial(self.rewards, bench))

    def rewards(self, bench: Workbench, rollouts: Rollouts) -> list[float]:
        dealt = [rollouts.completions[first :: self.datasets] for first in range(self.datasets)]
        values = [bench.dataset_value(texts, rollouts.step, index) for index, texts in enumerate(dealt)]
        bench.note(phi=sum(values) / len(values))
        return [values[place % self.datasets] for place in range(len(rollouts.completions))]
