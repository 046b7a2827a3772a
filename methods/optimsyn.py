"""OptimSyn: GRPO on the instructions under which a frozen generator writes, paid by the texts' influence (arXiv 2604.00536).

The policy, a copy of the generator, reads a document q (a prompt) and writes a rubric s, an instruction on how to write. The generator
itself, never trained, writes m = `texts` texts under document and rubric; the rubric's reward is their mean optimizer-aware influence:

    x_j ~ pi_0(. | q, s),    R(s) = 1/m sum_j <u_j, grad Phi(phi_0)>,    u_j: the first update of the target's optimizer from x_j alone

(`influence` with estimator=adam pays the same to the policy that writes the texts). A snapshot does what training
did: the policy writes a rubric of its own for every held-out prompt, the generator one text under it; both are charged. A rubric for each
document and one text for each rubric are the authors' choice (their code has the policy write rubrics anew after training).
Where ours differs from the authors': the inner product instead of the cosine; Adam's moments start at zero instead of after a warm-up, so
that u_j is nearly a sign (`influence` has both forms, as adam and less); and no penalty of 0.1 for rubrics that do not parse: here
every rubric is valid, and a rubric that the generator does not understand gets the influence of the texts written under it.
Cost per step (F = one forward pass of the target on the texts): 3F, sampling rubrics and m times as many texts, and 3 forward passes'
worth of policy update on the rubrics; as every policy's, its steps go on until the budget ends. It fails where no instruction that the
generator follows leads to better texts (a picture in the weights, a string that cannot be said), where a group's rubrics are all alike,
and where influence does: see `influence`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dpgbench.api import Method, Options, Prompt, Snapshot
from dpgbench.core.errors import UserError

if TYPE_CHECKING:
    from dpgbench.bench.prices import Prices
    from dpgbench.bench.workbench import Workbench

REQUEST_TOKENS = 10  # at most in the phrasebook, for a plan: what is said after a document


class OptimSyn(Method):
    version = 3

    def __init__(self, options: Options):
        super().__init__(options)
        if options.texts < 1:
            raise UserError(f"method.texts={options.texts}: a rubric is judged by a text or more; write texts=1")
        if options.rubric_tokens < 1:
            raise UserError(f"method.rubric_tokens={options.rubric_tokens}: a rubric has a token or more; write rubric_tokens=24")
        if options.policy.get("best_of", 1) > 1:
            raise UserError(f"policy.best_of={options.policy.best_of}: a rubric has one text written under it; write policy.best_of=1")

    def planned_flops(self, prices: Prices) -> float | None:
        rubric, texts = self.options.rubric_tokens, self.options.texts * self.options.policy.completions
        rewards = prices.sampled(texts, after=rubric) + 3 * prices.read(texts)
        steps = prices.policy(rewards, after=REQUEST_TOKENS, written=rubric)
        rubrics = prices.sampled(prices.spec.scale.deployment_texts, after=REQUEST_TOKENS, written=rubric)
        return None if steps is None else steps + rubrics + prices.deployment(after=rubric)

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        from dpgbench.bench.grpo import Rollouts, train_policy

        policy, request = self.options.policy, bench.world.instruction_request()
        per_step = policy.completions // policy.group_size
        self._check_that_it_fits(bench, bench.prompts(per_step, "policy", 0))
        writer = bench.generator.copy(max_completion_tokens=self.options.rubric_tokens)

        def rubric_rewards(rollouts: Rollouts):
            documents = bench.prompts(per_step, "policy", rollouts.step)  # what the policy read, without the request
            pairs = [(documents[place // policy.group_size], rubric) for place, rubric in enumerate(rollouts.completions)]
            texts = bench.sample(self._ruled(bench, [pair for pair in pairs for _ in range(self.options.texts)]), "ruled", rollouts.step)
            bench.note(ruled_texts=texts[:: max(1, len(texts) // 4)][:4])
            return bench.influences(texts, optimizer_aware=True).view(-1, self.options.texts).mean(1)

        def write(prompts: Sequence[Prompt]) -> list[str]:
            rubrics = bench.sample(bench.world.instruct(prompts, request), "rubrics", generator=writer)
            return bench.sample(self._ruled(bench, list(zip(prompts, rubrics, strict=True))), "deployment")

        yield from train_policy(bench, rubric_rewards, generator=writer, instruction=request, sample=write)

    def _ruled(self, bench: Workbench, pairs: Sequence[tuple[Prompt, str]]) -> list[Prompt]:
        """Each document with its rubric after it; a rubric of no words leaves the document alone."""
        return [bench.world.instruct([document], rubric)[0] if rubric.strip() else document for document, rubric in pairs]

    def _check_that_it_fits(self, bench: Workbench, documents: Sequence[Prompt]) -> None:
        """Document, rubric and text stand in one context of the generator."""
        reads = bench.generator.model.config.max_position_embeddings
        longest, text = bench.generator.tokenize(documents)["input_ids"].shape[1], bench.generator.max_completion_tokens
        if longest + self.options.rubric_tokens + text > reads:
            raise UserError(
                f"method.rubric_tokens={self.options.rubric_tokens}: the generator reads {reads} tokens, a document takes {longest} and a "
                f"text scale.max_completion_tokens={text}; write rubric_tokens={max(1, reads - longest - text)} or shorter texts"
            )
