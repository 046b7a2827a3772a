"""Active inheritance: best of n completions per prompt by a black-box score of each text (arXiv 2407.01490).

For every prompt of the deployment dataset, n completions are drawn and the best is kept:

    x*(q) = argmax_{k <= n} s(x_k),    x_k ~ pi_theta(. | q)

s is the task's own score (`Task.score`) or, where a task has none, the one-step utility: Phi of a fresh target after one optimizer step
on that text alone. n is the compute knob, and one run has the whole curve: snapshots for 1, 2, 4, ... and n completions of the same draws,
each charged its own. rounds > 1 (ours: the paper's generator and its student in one, round after round) fine-tunes the generator between
rounds on its own best of n for `round_prompts` training prompts, by likelihood; a later round's deployment texts are best of n of that
generator. A snapshot's step counts the completions drawn for a prompt, over all rounds.
Cost: n times the deployment dataset's sampling, and for the utility 3F per text (F = one forward pass of the target on it) and one Phi. A
further round: the same for its training prompts, and 3 forward passes' worth of the generator on each pair, `epochs` times. It
fails where the wanted text is rarer than one in n, where texts are only good together, and, with rounds, where the best of n fools the
score: the generator inherits that too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dpgbench.api import Method, Options, Prompt, Snapshot, TaskInfo
from dpgbench.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from dpgbench.bench.prices import Prices
    from dpgbench.bench.workbench import Workbench

CRITERIA = ("auto", "score", "utility")


class ActiveInheritance(Method):
    version = 2

    def __init__(self, options: Options):
        super().__init__(options)
        if options.n < 1:
            raise UserError(f"method.n={options.n}: best of n needs at least one completion per prompt; write n=4")
        if options.criterion not in CRITERIA:
            raise UserError(f"method.criterion={options.criterion}: no such criterion; {did_you_mean(options.criterion, CRITERIA)}")
        for name in ("rounds", "round_prompts", "epochs", "batch"):
            if options[name] < 1:
                raise UserError(f"method.{name}={options[name]}: must be 1 or more; write {name}=1, and rounds=1 for no fine-tuning")
        if options.lr <= 0:
            raise UserError(f"method.lr={options.lr}: a learning rate is positive; write method.lr=1e-3")

    def supports(self, task: TaskInfo) -> str | None:
        if self.options.criterion == "score" and "score" not in task.defines:
            return f"{task.name} has no black-box score of a text; use method.criterion=utility"

    def planned_flops(self, prices: Prices) -> float:
        options, scored = self.options, self.options.criterion != "utility" and "score" in prices.task.defines
        drawn = options.n * prices.deployment() + (0 if scored else 3 * prices.read(options.n * prices.spec.scale.deployment_texts))
        prices.earlier = drawn * (options.rounds if options.n > 1 else options.rounds - 1)  # 1 + 2 + 4 + ... completions, and each round's
        texts = options.round_prompts
        another = options.n * prices.sampled(texts) + (0 if scored else 3 * prices.read(options.n * texts))
        if options.rounds > 1:
            another += options.epochs * prices.finetuned(texts, options.batch)
        return drawn + (options.rounds - 1) * another

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        from dpgbench.bench.training_state import restore_weights, weights_of

        if self.options.rounds > 1:
            bench.generator.adapt(self.options.get("lora"), bench.seed("lora"))
        n, completed, model = self.options.n, 1, bench.generator.model
        if bench.saved is not None:
            restore_weights(model, bench.saved.tensors)
            completed = bench.saved.step // n
        else:
            for size in [2**power for power in range(n.bit_length()) if 2**power < n]:
                yield self._snapshot(bench, size, size)
        yield self._snapshot(bench, completed * n, n)
        while completed < self.options.rounds:
            self._inherit(bench, completed)
            completed += 1
            bench.checkpoint(completed * n, lambda: weights_of(model))
            yield self._snapshot(bench, completed * n, n)

    def _snapshot(self, bench: Workbench, step: int, n: int) -> Snapshot:
        from dpgbench.worlds.adapters import trained

        trains = self.options.rounds > 1
        weights = (lambda: trained(bench.generator.model)) if trains else None
        return Snapshot(step, lambda prompts: self._best(bench, prompts, n, "deployment")[0], weights=weights)

    def _inherit(self, bench: Workbench, number: int) -> None:
        """Fine-tune the generator on the best of its own texts."""
        options, prompts = self.options, bench.prompts(self.options.round_prompts, "round", number)
        texts, values = self._best(bench, prompts, options.n, "round", number)
        loss = bench.finetune(prompts, texts, number, lr=options.lr, epochs=options.epochs, batch=options.batch)
        bench.record(round=number, value=sum(values) / len(values), loss=loss, texts=texts[:4])

    def _best(self, bench: Workbench, prompts: Sequence[Prompt], n: int, *names: object) -> tuple[list[str], list[float]]:
        """Each prompt's best text and its value, the first of equals. Of the same draws a smaller n has the first; `base` has one."""
        draws = [bench.sample(prompts, *names, *([draw] if draw else []), remember=True) for draw in range(n)]
        values = self._values(bench, [text for draw in draws for text in draw])
        best = [max(range(place, len(values), len(prompts)), key=values.__getitem__) for place in range(len(prompts))]
        return [draws[index // len(prompts)][index % len(prompts)] for index in best], [values[index] for index in best]

    def _values(self, bench: Workbench, texts: list[str]) -> list[float]:
        if self.options.criterion != "utility":
            scores = bench.task.score(texts)
            if scores is not None:
                return scores
        return bench.one_step_utilities(texts)
