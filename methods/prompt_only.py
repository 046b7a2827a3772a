"""The untouched generator under an instruction that states the goal in words, or under the best of k of them by Phi (ours).

search=1 says the task's own `hint` after every prompt, and after the scale's `instruction` where it has one. search=k > 1 also tries
k - 1 instructions that the corpus offers, drawn at random, and keeps

    argmax_s  Phi(phi_T(s)),    phi_T(s): a fresh target trained on `search_texts` texts written under instruction s,

all under the same prompts and sampling seed; equal values keep the first, the hint being first of all. One run yields the curve over k =
1, 2, 4, ... search=budget spends the whole budget by sequential halving (Karnin, Koren and Somekh, ICML 2013): all candidates, or as many
of them as it can judge twice over, are judged on a dataset each, and then on another one each, until a round has had its equal share of
what is left; the better half by mean Phi goes on, until one is left. A snapshot's step is then the number of datasets judged.
Ours; the plain hint is what a
practitioner would try before anything else. Cost: the deployment dataset's sampling, and per dataset judged the sampling of `search_texts`
texts, 3F for T steps on them (F = one forward pass of the target) and one Phi. It fails where no words state the goal (a picture in the
weights), and where the generator does not understand them: a hint is used as it is, and what a small vocabulary lacks becomes <unk>. Where
the corpus has no instructions, search=budget has nothing to spend on and is the hint.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from dpgbench.api import Method, Options, Prompt, Snapshot, TaskInfo
from dpgbench.bench.spending import BUDGET
from dpgbench.core.errors import UserError

if TYPE_CHECKING:
    from dpgbench.bench.prices import Prices
    from dpgbench.bench.workbench import Workbench

INSTRUCTION_TOKENS = 10  # at most in the phrasebook, for a plan
ROOM = 0.25  # of a deployment dataset's price, kept back by search=budget: under another instruction it may cost more than under the hint


@dataclass
class _Search:
    """Where a sequential halving stands. Candidates go by their places; shares are of the budget."""

    values: list[list[float]]
    """Phi of each dataset of each candidate."""
    field: list[int] = field(default_factory=lambda: [0])
    """Who is still in it, the best first; the hint before anything is judged."""
    room: float = 0.0
    """What is kept back."""
    dearest: float = 0.0
    """The price of the dearest dataset."""

    @property
    def judged(self) -> int:
        return sum(map(len, self.values))

    @property
    def behind(self) -> list[int]:
        """Those in the field with the fewest datasets, which is all of them once each has had as many."""
        fewest = min(len(self.values[place]) for place in self.field)
        return [place for place in self.field if len(self.values[place]) == fewest]

    def halve(self) -> None:
        """The better half by mean Phi stays, rounded up; equal ones in their first order."""
        ranked = sorted(self.field, key=lambda place: (-fmean(self.values[place]), place))
        self.field = ranked[: (len(ranked) + 1) // 2]


class PromptOnly(Method):
    budget_options: ClassVar = ("search",)

    def __init__(self, options: Options):
        super().__init__(options)
        if options.search != BUDGET and options.search < 1:
            raise UserError(f"method.search={options.search}: at least the hint is tried; write search=1 for it alone")
        if options.search_texts < 1:
            raise UserError(f"method.search_texts={options.search_texts}: a target needs a text or more; write search_texts=64")

    def supports(self, task: TaskInfo) -> str | None:
        if "hint" not in task.defines:
            return f"{task.name} has no hint, the instruction that states its goal in words"

    def planned_flops(self, prices: Prices) -> float:
        texts, search = self.options.search_texts, self.options.search
        tried = prices.sampled(texts, after=INSTRUCTION_TOKENS) + 3 * prices.read(texts)
        prices.last = prices.deployment(after=INSTRUCTION_TOKENS)
        if search == BUDGET:
            return max(prices.last, prices.all_spent(tried, texts * prices.written))
        return (search if search > 1 else 0) * tried + prices.last

    def run(self, bench: Workbench) -> Iterator[Snapshot]:
        candidates = self._candidates(bench)
        if self.options.search == BUDGET:
            yield from self._halving(bench, candidates)
            return
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
        return self._instructed(bench, candidates[values.index(max(values)) if values else 0], max(1, len(values)))

    def _instructed(self, bench: Workbench, instruction: str, step: int) -> Snapshot:
        def write(prompts: Sequence[Prompt]) -> list[str]:
            return bench.sample(bench.world.instruct(prompts, instruction), "deployment")

        return Snapshot(step, write)

    def _halving(self, bench: Workbench, candidates: Sequence[str]) -> Iterator[Snapshot]:
        """Sequential halving of the candidates by their mean Phi, until one is left."""
        search = _Search(**bench.saved.numbers) if bench.saved else _Search([[] for _ in candidates])
        yield self._instructed(bench, candidates[search.field[0]], max(1, search.judged))
        if len(candidates) == 1:
            return
        if not search.judged:
            search.room = ROOM * bench.spent_share()  # which is that of a deployment dataset: nothing else is spent yet
            self._judge(bench, candidates, search)  # the hint, which shows what a dataset costs
            affordable = 1 + int((1 - search.room - bench.spent_share()) / search.dearest)
            search.field = list(range(min(len(candidates), max(1, affordable // 2))))  # the later rounds need about as many as the first
        while len(search.field) > 1:
            left = 1 - search.room - bench.spent_share()
            share_of_round = bench.spent_share() + left / math.ceil(math.log2(len(search.field)))
            end = 1 - search.room  # for each one's first dataset of the round, and then the round's share
            while bench.spent_share() + len(search.behind) * search.dearest <= end:
                self._judge(bench, candidates, search)
                end = share_of_round
            if end != share_of_round:
                return  # nobody had another one, and the leader is the answer already
            search.halve()
            answer = self._instructed(bench, candidates[search.field[0]], search.judged)
            if len(search.field) == 1 and bench.share_with(answer) > 1:
                return  # the answer before it is the last that fits
            bench.checkpoint(search.judged, dict, lambda: asdict(search))
            yield answer

    def _judge(self, bench: Workbench, candidates: Sequence[str], search: _Search) -> None:
        """A dataset for each one in the field that has had fewer than others."""
        for place in search.behind:
            before, values = bench.spent_share(), search.values[place]
            values.append(self._value(candidates[place], bench, place + 1, len(values)))
            search.dearest = max(search.dearest, bench.spent_share() - before)

    def _candidates(self, bench: Workbench) -> list[str]:
        """The hint first."""
        hint = bench.task.hint()
        if hint is None:
            raise UserError(f"task={bench.spec.task.name}: its hint() is None with these options, and there is nothing to say")
        others = [instruction for instruction in bench.world.instructions() if instruction != hint]
        search = 1 + len(others) if self.options.search == BUDGET else self.options.search
        if search > 1 + len(others):
            raise UserError(
                f"method.search={search}: the hint and {len(others)} instructions of the corpus are all there is; "
                f"write search={1 + len(others)} or less"
            )
        candidates = [hint, *random.Random(bench.seed("instructions")).sample(others, search - 1)]
        bench.world.check_room(candidates)
        return candidates

    def _value(self, instruction: str, bench: Workbench, number: int, dataset: int = 0) -> float:
        """Phi of a fresh target trained on texts written under the instruction; every `dataset` has prompts and noise of its own."""
        names = ("search", dataset) if dataset else ("search",)
        prompts = bench.prompts(self.options.search_texts, *names)
        texts = bench.sample(bench.world.instruct(prompts, instruction), *names)
        value = bench.dataset_value(texts, *names)
        bench.record(candidate=number, phi=value, instruction=instruction, texts=texts[:4])
        return value
