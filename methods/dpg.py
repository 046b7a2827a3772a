"""Dataset Policy Gradient: GRPO on exact metagradients (arXiv 2604.08423).

Each step samples P x G completions, trains a fresh target on them, and rewards completion i with

    tau_i = d Phi(phi_T) / d w_i   at w = 1,

the derivative of the metric through the whole training run with respect to that text's loss weight (paper, section 3). Options of the
paper's ablations: `cross_group=false` makes G datasets, the k-th of the k-th completion of every prompt, and differentiates each one's
own training; `inner_optimizer=sgd` differentiates through SGD, whatever trains the deployment target; T is training.inner_steps, the
advantages' divisor policy.scale_advantages.
Ours: `credit=token` pays each token, instead of tau_i, the sum of its own and the later tokens' shares of it, less `baseline`
(docs/method.md, "Credit for single tokens"): the same direction with less variance, out of the same reverse pass. `discount` below 1 counts
later shares for less: less variance still, and a direction that turns.
Cost per step (F = one forward pass of the target on the completions): 3F for the target's training, up to 2F + 9(1 - 1/T)F for the
metagradients, sampling, 3 forward passes' worth of policy update, and what `baseline=critic` takes.
It fails where a policy has lost its entropy, and where noise drowns the metagradients: a saturated optimizer (AdamW's first step with
eps_root far below the squared gradients) leaves mostly variance where Phi adds up many weights, variance and bias where it reads few
(`sixseven` at eps_root=1e-9: 95 times the variance; docs/method.md). Dividing by the group's std, the paper's choice, is a bias that more
texts do not remove.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from dpgbench.api import Method, Options, Snapshot
from dpgbench.bench import credit
from dpgbench.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from dpgbench.bench.grpo import Rollouts
    from dpgbench.bench.prices import Prices
    from dpgbench.bench.workbench import Workbench

OPTIMIZERS = ("adamw", "sgd")


class DPG(Method):
    version = 5
    defaults: ClassVar = {"credit": "text", "baseline": "group", "discount": 1.0}

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
        credit.check_options(options)
        self.baseline = options.baseline

    def target_passes(self, steps: int) -> float:
        return 5 + 9 * (1 - 1 / steps)

    def planned_flops(self, prices: Prices) -> float | None:
        passes = self.target_passes(prices.spec.training.inner_steps)
        steps = prices.policy(passes * prices.read(self.options.policy.completions) + prices.baseline(self.baseline))
        return None if steps is None else steps + prices.deployment()

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        from dpgbench.bench.grpo import train_policy

        credit.check_causal(bench.spec)
        yield from train_policy(bench, partial(self.rewards, bench), baseline=self.baseline)

    def rewards(self, bench: Workbench, rollouts: Rollouts) -> Tensor:
        import torch

        from dpgbench.bench.token_credit import discounted, in_generated_tokens

        credit.check_causal(bench.spec)
        by_token = self.options.credit == "token"
        through = {"optimizer": self.options.inner_optimizer, "lr": self.options.inner_lr}
        datasets = 1 if self.options.cross_group else self.options.policy.group_size
        dealt = [rollouts.completions[first::datasets] for first in range(datasets)]
        outcomes = [bench.metagradients(texts, rollouts.step, k, per_token=by_token, **through) for k, texts in enumerate(dealt)]
        bench.note(phi=sum(outcome.value for outcome in outcomes) / datasets)
        rewards = torch.stack([outcome.rewards for outcome in outcomes], dim=1).flatten(0, 1)
        if not by_token:
            return rewards
        texts = rollouts.completions, rollouts.completion_ids
        paid = in_generated_tokens(rewards, *texts, bench.generator, bench.world.target_tokenizer)
        return discounted(paid, self.options.discount)
