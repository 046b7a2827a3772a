"""GRPO on an influence estimate instead of a metagradient: TracIn's dot product, LESS's optimizer update, or EK-FAC's inverse curvature.

The reward of completion i is what one step on it alone would do to Phi, to first order, from the initial target phi_0:

    dot     <-grad l_i(phi_0), grad Phi(phi_0)>                     the step is one of gradient descent (TracIn, arXiv 2002.08484)
    adam    <u_i, grad Phi(phi_0)>                                  u_i the optimizer's first update, from zero moments
    less    <u_i, grad Phi(phi_W)>                                  u_i its next update after W steps of warm-up (LESS, arXiv 2402.04333)
    ekfac   <-grad l_i(phi_0), (G + lambda)^-1 grad Phi(phi_0)>     an influence function (EK-FAC, arXiv 2308.03296)

With AdamW, an update is u_i = -lr m_hat / (sqrt(v_hat + eps_root) + eps), of moments that text i's gradient has just entered; from zero
moments that is -lr g_i / (sqrt(g_i^2 + eps_root) + eps), nearly a sign. With SGD, u_i = -lr g_i. Nothing is trained but less's warm-up:
no rewards for texts that are only good together, no T, and grad Phi is taken once per cell.
What less and ekfac learn from is `influence_texts` texts of the untouched generator for training prompts: where the policy begins, to be
had at every scale (of a pretrained target's own corpus only its authors have more), and paid for once per cell, before the first step.
For less they are W = `warmup_steps` batches; for ekfac the texts of which G is the mean curvature, with labels drawn from phi_0, and
lambda = `damping` times the mean eigenvalue of each module's block (`dpgbench.metagrad.curvature`, its memory too). kronfluence 1.0.1 and
bergson 2.5.1 were looked at for this: the former tracks Linear and Conv2d alone, neither takes a metric of the weights.
dot and ekfac are linear in the text's gradient, hence sums over its tokens' losses: `credit=token` pays each token its own and the later
tokens' terms, less `baseline` (docs/method.md, "Credit for single tokens"), out of the same product at the same cost. adam and less divide
by moments that later tokens change, so that no token's credit is its own.
Where ours differs from the authors': LESS scores by a cosine of randomly projected LoRA gradients, summed over the checkpoints of four
epochs on 5% of the candidates, and selects once from a fixed pool; less has the inner product of whole gradients at one checkpoint. `adam`
is not LESS: its moments know of one text. Grosse et al. take G from the pretraining corpus and of MLP layers alone; ekfac reaches every
parameter that Phi's gradient does.
Cost per step (F = one forward pass of the target on the completions): 3F, by a forward-mode product for dot and ekfac and by per-text
gradients for adam and less; sampling; 3 forward passes' worth of policy update; and what `baseline=critic` takes. Once: sampling
`influence_texts`, and 3F of those for less, for ekfac 3F to 8F and the products of its factors. It fails where Phi's gradient at phi_0 has
another direction than after T steps, and where the optimizer step of a batch is not like the sum of the steps of its texts (dot under
AdamW). It does not see the effect of the other texts in the batch, so it also fails where the metric saturates or where a text adds
nothing to what the batch already does; ekfac also where G is mostly damping: directions that the sampled texts do not move.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from dpgbench.api import Method, Options, Snapshot
from dpgbench.bench import credit
from dpgbench.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from dpgbench.bench.grpo import Rollouts
    from dpgbench.bench.prices import Prices
    from dpgbench.bench.workbench import Workbench

ESTIMATORS = ("dot", "adam", "less", "ekfac")
LINEAR = ("dot", "ekfac")  # in the text's gradient


class Influence(Method):
    version = 3
    defaults: ClassVar = {"credit": "text", "baseline": "group", "discount": 1.0}

    def __init__(self, options: Options):
        super().__init__(options)
        self._judging: dict[str, Any] | None = None
        if options.estimator not in ESTIMATORS:
            raise UserError(f"method.estimator={options.estimator}: no such estimator; {did_you_mean(options.estimator, ESTIMATORS)}")
        if not (options.damping > 0 and math.isfinite(options.damping)):
            raise UserError(f"method.damping={options.damping}: without damping G has no inverse; write damping=0.1")
        texts, steps = options.influence_texts, options.warmup_steps
        if texts < 1:
            raise UserError(f"method.influence_texts={texts}: less and ekfac learn from a text or more; write influence_texts=512")
        if steps < 1 or (texts % steps and options.estimator == "less"):
            raise UserError(f"method.warmup_steps={steps}: 1 or more, and must divide influence_texts={texts}; write warmup_steps=1, say")
        credit.check_options(options)
        if options.credit == "token" and options.estimator not in LINEAR:
            why = "it divides by moments that later tokens change, so no token's credit is its own"
            raise UserError(f"method.credit=token with estimator={options.estimator}: {why}; write estimator=dot or ekfac with it")
        self.baseline = options.baseline

    def planned_flops(self, prices: Prices) -> float | None:
        steps = prices.policy(3 * prices.read(self.options.policy.completions) + prices.baseline(self.baseline))
        return None if steps is None else steps + self._once(prices) + prices.deployment()

    def _once(self, prices: Prices) -> float:
        """Before the first step."""
        texts = self.options.influence_texts
        if self.options.estimator == "less":
            return prices.sampled(texts) + 3 * prices.read(texts)
        return prices.sampled(texts) + prices.curvature(texts) if self.options.estimator == "ekfac" else 0.0

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        from dpgbench.bench.grpo import train_policy

        credit.check_causal(bench.spec)
        self._prepared(bench)  # while the generator is untouched, in a run that goes on as well
        yield from train_policy(bench, partial(self.rewards, bench), baseline=self.baseline)

    def rewards(self, bench: Workbench, rollouts: Rollouts) -> Tensor:
        from dpgbench.bench.token_credit import discounted, in_generated_tokens

        credit.check_causal(bench.spec)
        texts, judging = rollouts.completions, self._prepared(bench)
        if self.options.credit == "text":
            return bench.influences(texts, **judging)
        by_token = bench.influences(texts, **judging, per_token=True)
        paid = in_generated_tokens(by_token, texts, rollouts.completion_ids, bench.generator, bench.world.target_tokenizer)
        return discounted(paid, self.options.discount)

    def _prepared(self, bench: Workbench) -> dict[str, Any]:
        """How `Workbench.influences` is to judge, found out once."""
        if self._judging is None:
            self._judging = self._prepare(bench)
        return self._judging

    def _prepare(self, bench: Workbench) -> dict[str, Any]:
        options = self.options
        if options.estimator in ("dot", "adam"):
            return {"optimizer_aware": options.estimator == "adam"}
        with bench.once(options.estimator):
            texts = bench.sample(bench.prompts(options.influence_texts, "influence"), "influence")
            if options.estimator == "less":
                return {"optimizer_aware": True, "checkpoint": bench.warmed_up(texts, options.warmup_steps)}
            return {"direction": bench.inverse_curvature_product(texts, damping=options.damping)}
