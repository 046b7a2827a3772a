"""The untouched generator under an instruction that states the goal in words, or under the best of k of them by Phi (ours).

search=1 says the task's own `hint` after every prompt, and after the scale's `instruction` where it has one. search=k > 1 also tries
k - 1 instructions that the corpus offers, drawn at random, and keeps

    argmax_s  Phi(phi_T(s)),    phi_T(s): a fresh target trained on `search_texts` texts written under instruction s,

all under the same prompts and sampling seed; equal values keep the first, the hint being first of all. One run yields the curve over k =
1, 2, 4, ... Ours; the plain hint is what a
practitioner would try before anything else. Cost: the deployment dataset's sampling, and per candidate the sampling of `search_texts`
texts, 3F for T steps on them (F = one forward pass of the target) and one Phi. It fails where no words state the goal (a picture in the
weights), and where the generator does not understand them: a hint is used as it is, and what a small vocabulary lacks becomes <unk>.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dpgbench.api import Method, Options, Prompt, Snapshot, TaskInfo
from dpgbench.core.errors import UserError

if TYPE_CHECKING:
    from dpgbench.bench.prices import Prices
    from dpgbench.bench.workbench import Workbench

INSTRUCTION_TOKENS = 10  # at most in the phrasebook, for a plan


class PromptOnly(Method):
    def __init__(self, options: Options):
        super().__init__(options)
        if options.search < 1:
            raise UserError(f"method.search={options.search}: at least the hint is tried; write search=1 for it alone")
        if options.search_texts < 1:
            raise UserError(f"method.search_texts={options.search_texts}: a target needs a text or more; write search_texts=64")

    def supports(self, task: TaskInfo) -> str | None:
        if "hint" not in task.defines:
            return f"{task.name} has no hint, the instruction that states its goal in words"

    def planned_flops(self, prices: Prices) -> float:
        texts, candidates = self.options.search_texts, self.options.search if self.options.search > 1 else 0
        tried = prices.sampled(texts, after=INSTRUCTION_TOKENS) + 3 * prices.read(texts)
        return candidates * tried + prices.deployment(after=INSTRUCTION_TOKENS)

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        candidates = self._candidates(bench)
        values: list[float] = list(bench.saved.numbers["values"]) if bench.saved else []
        yield self._best(candidates, values, bench)
        if len(candidates) == 1:
            return  # and nothing to compare it with
        for tried, instruction in enumerate(candidates[len(values) :], start=len(values) + 1):
            values.append(self._value(instruction, bench, tried))
            if tried in (2, 4, 8, 16, len(candidates)):
                bench.checkpoint(tried, dict, lambda: {"values": values})
                yield self._best(candidates, values, bench)

    def _best(self, candidates: Sequence[str], values: Sequence[float], bench: Workbench) -> Snapshot:
        """Of those with a value; before there are any, the hint."""
        instruction = candidates[values.index(max(values)) if values else 0]

        def instructed(prompts: Sequence[Prompt]) -> list[str]:
            return bench.sample(bench.world.instruct(prompts, instruction), "deployment")

        return Snapshot(step=max(1, len(values)), sample=instructed)

    def _candidates(self, bench: Workbench) -> list[str]:
        """The hint first."""
        hint = bench.task.hint()
        if hint is None:
            raise UserError(f"task={bench.spec.task.name}: its hint() is None with these options, and there is nothing to say")
        others = [instruction for instruction in bench.world.instructions() if instruction != hint]
        if self.options.search > 1 + len(others):
            raise UserError(
                f"method.search={self.options.search}: the hint and {len(others)} instructions of the corpus are all there is; "
                f"write search={1 + len(others)} or less"
            )
        candidates = [hint, *random.Random(bench.seed("instructions")).sample(others, self.options.search - 1)]
        bench.world.check_room(candidates)
        return candidates

    def _value(self, instruction: str, bench: Workbench, number: int) -> float:
        """Phi of a fresh target trained on texts written under the instruction."""
        prompts = bench.prompts(self.options.search_texts, "search")
        texts = bench.sample(bench.world.instruct(prompts, instruction), "search")
        value = bench.dataset_value(texts, "search")
        bench.record(candidate=number, phi=value, instruction=instruction, texts=texts[:4])
        return value
