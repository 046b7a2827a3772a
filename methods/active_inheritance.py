"""Active inheritance: best of n completions per prompt by a black-box score of each text (arXiv 2407.01490).

For every prompt of the deployment dataset, n completions are drawn and the best is kept:

    x*(q) = argmax_{k <= n} s(x_k),    x_k ~ pi_theta(. | q)

s is the task's own score (`Task.score`) or, where a task has none, the one-step utility: Phi of a fresh target after one optimizer step
on that text alone (`dpgbench.bench.best_of`). n sets the amount of compute, and one run gives the whole curve: snapshots for the first 1,
2, 4, ... and n of the same completions, drawn and scored once, each charged its own full cost as if there were no other. n=budget: the
largest n whose whole cost the budget pays for. rounds > 1 (ours: the paper's generator and its student in one, round after round)
fine-tunes the generator between rounds on its own best of n for `round_prompts` training prompts, by likelihood; a later round's
deployment texts are best of n of that generator. rounds=budget: rounds until the next one would not fit. Every round is an answer, or with
scored=doublings those at which the spending has doubled, and the last: scoring an answer may take longer than a round. A snapshot's step
counts the completions drawn for a prompt, over all rounds: with n=budget the last one's is the n it came to.
Where ours differs from the authors': one generator, the scale's, writes all n texts, where they also pick among those of several models;
the student is the scale's target, trained as every method's is; and the one-step utility is ours, for tasks whose texts have no score.
Cost: n times the deployment dataset's sampling, and for the utility 3F per text (F = one forward pass of the target on it) and one Phi. A
further round: the same for its training prompts, and 3 forward passes' worth of the generator on each pair, `epochs` times. It
fails where the wanted text is rarer than one in n, where texts are only good together, and, with rounds, where the best of n fools the
score: the generator inherits that too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from dpgbench.api import Method, Options, Snapshot, TaskInfo
from dpgbench.bench.best_of import CRITERIA, Candidates
from dpgbench.bench.spending import BUDGET, Spending, largest_within
from dpgbench.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from dpgbench.bench.prices import Prices
    from dpgbench.bench.workbench import Workbench


SCORED = ("every", "doublings")
"""Which rounds are answers: every one, or those at which twice as much is spent as at the one before, and the last."""


class ActiveInheritance(Method):
    version = 2
    budget_options: ClassVar = ("n", "rounds")
    defaults: ClassVar = {"scored": "every"}

    def __init__(self, options: Options):
        super().__init__(options)
        if options.n != BUDGET and options.n < 1:
            raise UserError(f"method.n={options.n}: best of n needs at least one completion per prompt; write n=4")
        if options.criterion not in CRITERIA:
            raise UserError(f"method.criterion={options.criterion}: no such criterion; {did_you_mean(options.criterion, CRITERIA)}")
        if options.scored not in SCORED:
            raise UserError(f"method.scored={options.scored}: no such choice of rounds; {did_you_mean(options.scored, SCORED)}")
        for name in ("rounds", "round_prompts", "epochs", "batch"):
            if options[name] != BUDGET and options[name] < 1:
                raise UserError(f"method.{name}={options[name]}: must be 1 or more; write {name}=1, and rounds=1 for no fine-tuning")
        if options.n == BUDGET and options.rounds != 1:
            raise UserError(f"method.rounds={options.rounds}: with n=budget the first round spends everything; write rounds=1, or n=4")
        if options.lr <= 0:
            raise UserError(f"method.lr={options.lr}: a learning rate is positive; write method.lr=1e-3")

    def supports(self, task: TaskInfo) -> str | None:
        if self.options.criterion == "score" and "score" not in task.defines:
            return f"{task.name} has no black-box score of a text; use method.criterion=utility"

    def planned_flops(self, prices: Prices) -> float:
        options, texts, written = self.options, prices.spec.scale.deployment_texts, prices.written
        if options.n == BUDGET:
            prices.last = prices.all_spent(prices.best_of(1, texts, options.criterion), texts * written)
            return prices.last
        drawn = prices.best_of(options.n, texts, options.criterion)
        another = prices.best_of(options.n, options.round_prompts, options.criterion)
        if options.rounds != 1:
            another += options.epochs * prices.finetuned(options.round_prompts, options.batch)
        prices.last = drawn
        if options.rounds == BUDGET:
            whole = prices.all_spent(another, options.n * options.round_prompts * written)
            prices.earlier = drawn * self._answers(max(0.0, (whole - drawn) / another))
            return max(drawn, whole)
        prices.earlier = drawn * self._answers(options.rounds - 1)
        return drawn + (options.rounds - 1) * another

    def _answers(self, rounds: float) -> float:
        """How many of so many rounds are answers."""
        return rounds if self.options.scored == "every" else math.log2(1 + rounds)

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        candidates = Candidates(bench, self.options.criterion, "deployment")
        if self.options.rounds == 1:
            yield from self._curve(bench, candidates)
        else:
            yield from self._rounds(bench, candidates)

    def _curve(self, bench: Workbench, candidates: Candidates) -> Iterator[Snapshot]:
        """Best of 1, 2, 4, ... and n of the same completions."""
        n = self.options.n
        if n == BUDGET:
            n = largest_within(lambda size: bench.share_with(self._answer(bench, candidates, size, size)))
        for size in [2**power for power in range(n.bit_length()) if 2**power < n]:
            yield self._answer(bench, candidates, size, size)
        yield self._answer(bench, candidates, n, n)

    def _rounds(self, bench: Workbench, candidates: Candidates) -> Iterator[Snapshot]:
        """The curve, and then best of n of a generator that was fine-tuned once more before each."""
        from dpgbench.bench.training_state import WayBack, restore_weights, weights_of

        n, completed, model = self.options.n, 1, bench.generator.model
        spending, seen = Spending(), 0.0  # seen: FLOPs at the last round that was an answer
        bench.generator.adapt(self.options.get("lora"), bench.seed("lora"))
        if bench.saved is None:
            yield from self._curve(bench, candidates)
        else:
            restore_weights(model, bench.saved.tensors)
            completed, numbers = bench.saved.step // n, bench.saved.numbers
            spending, seen = Spending(*numbers.get("spending", ())), numbers.get("seen", 0.0)  # older checkpoints lack one or the other
        waiting = bench.saved is not None  # whether the last round is an answer that nobody has seen
        while True:
            if waiting and self._is_due(bench, seen):
                seen, waiting = bench.meter.total_flops, False
                yield self._answer(bench, candidates, completed * n, n)
            if not self._is_another(bench, completed, spending):
                break
            way_back = WayBack(bench, model) if self.options.rounds == BUDGET else None
            self._inherit(bench, completed)
            answer = self._answer(bench, candidates, (completed + 1) * n, n)
            # Asking for its price draws it: only where one that is twice as dear as the last would not fit.
            if way_back and bench.spent_share(answers=2) > 1 and bench.share_with(answer) > 1:
                way_back.take()  # the round before it is the last that fits, and its generator the result
                break
            completed, waiting = completed + 1, True
            saved = {"spending": [spending.spent, spending.dearest], "seen": seen}
            bench.checkpoint(completed * n, lambda: weights_of(model), lambda saved=saved: saved)
        if waiting:
            yield self._answer(bench, candidates, completed * n, n)

    def _is_due(self, bench: Workbench, seen: float) -> bool:
        return self.options.scored == "every" or bench.meter.total_flops >= 2 * seen

    def _is_another(self, bench: Workbench, completed: int, spending: Spending) -> bool:
        if self.options.rounds == BUDGET:
            return spending.leaves_a_step(completed - 1, bench.spent_share())
        return completed < self.options.rounds

    def _answer(self, bench: Workbench, candidates: Candidates, step: int, n: int) -> Snapshot:
        from dpgbench.worlds.adapters import trained

        weights = (lambda: trained(bench.generator.model)) if self.options.rounds != 1 else None
        return Snapshot(step, lambda prompts: candidates.best(prompts, n)[0], weights=weights)

    def _inherit(self, bench: Workbench, number: int) -> None:
        """Fine-tune the generator on the best of its own texts."""
        options, prompts = self.options, bench.prompts(self.options.round_prompts, "round", number)
        texts, values = Candidates(bench, options.criterion, "round", number).best(prompts, options.n)
        loss = bench.finetune(prompts, texts, number, lr=options.lr, epochs=options.epochs, batch=options.batch)
        bench.record(round=number, value=sum(values) / len(values), loss=loss, texts=texts[:4])
