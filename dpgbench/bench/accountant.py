"""What a cell's work costs: each piece is charged to the meter by what it is, and what is left of the budget follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from dpgbench.bench import flops as compute
from dpgbench.bench.distributed import SINGLE_PROCESS, SingleProcess
from dpgbench.bench.meter import Budget, Meter
from dpgbench.core.labels import IGNORED_LABEL
from dpgbench.core.plugin_types import TaskView
from dpgbench.metagrad import Metagradients, signal_gradients
from dpgbench.metagrad.loss import initial_parameters
from dpgbench.worlds.generator import Generator

if TYPE_CHECKING:
    from torch import Tensor, nn

Work = TypeVar("Work")


class Accountant:
    """Charges in F, one forward pass of the target over the texts at hand, or as torch counted them where only the engine or the task
    knows what is computed. `reserve` is what a deployment dataset costs, as far as the harness knows yet."""

    def __init__(self, target: nn.Module, task: TaskView, meter: Meter, budget: Budget, group: SingleProcess = SINGLE_PROCESS):
        self.target, self.task, self.meter, self.budget, self.group = target, task, meter, budget, group
        self.reserve = Meter()
        self._paid: set[str] = set()  # once per cell, also where a run that goes on computes it again
        self._metagradient_flops: dict[tuple, float] = {}  # of one call, by the batches' shapes
        self._signal_flops: float | None = None

    def spent_share(self, answers: int = 1) -> float:
        """The share of the budget that an answer drawn now would have cost: 0 without a budget, above 1 if it is too much.

        Of a deployment dataset it takes the price of the last one, `answers` times."""
        return self.budget.share(sum([self.reserve] * answers, start=self.meter))

    # ---- the generator's work

    def generation(self, generator: Generator, batch: int, prompt_length: int, new_tokens: int) -> None:
        """Sampling `batch` completions at once."""
        flops = compute.sampling_flops(generator.model, batch, prompt_length, new_tokens)
        self.meter.charge("generate", flops, generated=batch * new_tokens)

    def finetuning(self, generator: Generator, completions: Sequence[str], epochs: int, shapes: Sequence[tuple[int, int]]) -> None:
        """So many epochs on the completions, in steps of these (texts, length)."""
        shape = compute.shape_of(generator.model, trains=True)
        flops = sum(shape.training_flops(*step) for step in shapes)
        tokens = sum(len(generator.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in completions)
        self.meter.charge("policy_update", flops, trained=epochs * tokens)

    # ---- the target's work

    def training(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """A step of the target on each batch: 3F."""
        self.meter.charge("training", 3 * self._forward(batches), trained=_labels_in(batches))

    def metagradients(self, batches: Sequence[Mapping[str, Tensor]], differentiate: Callable[[], Metagradients]) -> Metagradients:
        """What `differentiate` returns. Training is 3F; the rest is counted at the first call on batches of these shapes."""
        shapes = tuple(tuple(batch["input_ids"].shape) for batch in batches)
        if shapes in self._metagradient_flops:
            outcome = differentiate()
        else:
            outcome, flops = compute.counted_flops(differentiate)
            self._metagradient_flops[shapes] = self._of_all_processes(flops)
        self.training(batches)
        self.meter.charge("metagradient", self._metagradient_flops[shapes] - 3 * self._forward(batches))
        return outcome

    def signal(self) -> None:
        """One Phi."""
        self.meter.charge("scoring", self._signal_cost())

    def judged(self, texts: Mapping[str, Tensor], signals: int = 0) -> None:
        """Each text judged alone by the target's step on it: 3F, and so many Phi."""
        price = 3 * self._forward([texts])
        if signals:
            price += signals * self._signal_cost()
        self.meter.charge("scoring", price, trained=_labels_in([texts]))

    def counted(self, phase: str, work: Callable[[], Work], *, once: str | None = None) -> Work:
        """What `work` returns, charged what torch counts. With `once`, its name, only the first time in this cell."""
        outcome, flops = compute.counted_flops(work)
        if once not in self._paid:
            self.meter.charge(phase, flops)
        if once is not None:
            self._paid.add(once)
        return outcome

    @contextmanager
    def once(self, name: str) -> Iterator[None]:
        """Inside, charges count only the first time in this cell: for preparations that a run which goes on has to make again."""
        with self.meter.deployment() if name in self._paid else nullcontext():  # whose charges are then nobody's
            yield
        self._paid.add(name)

    def again(self, seconds: float) -> None:
        """Wall-clock seconds of work that is charged once more and not done once more."""
        self.meter.charge_seconds(seconds)

    # ---- going on after an interruption

    def state(self) -> dict[str, Any]:
        """What later charges depend on, the meter aside."""
        flops = [[[list(shape) for shape in shapes], value] for shapes, value in self._metagradient_flops.items()]
        return {"charged": sorted(self._paid), "metagradient_flops": flops, "reserve": self.reserve.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """As it was when `state` gave this."""
        self._paid = set(state["charged"])
        self.reserve.restore(state["reserve"])
        self._metagradient_flops = {tuple(tuple(shape) for shape in shapes): value for shapes, value in state["metagradient_flops"]}

    # ---- prices

    def _forward(self, batches: Sequence[Mapping[str, Tensor]]) -> float:
        """F, summed over batches."""
        return sum(compute.forward_flops(self.target, *batch["input_ids"].shape) for batch in batches)

    def _of_all_processes(self, metagradient_flops: float) -> float:
        """What one process would have computed: shares add up, and the derivative of Phi, which every process takes, counts once."""
        if self.group.size == 1:
            return metagradient_flops
        _, repeated = compute.counted_flops(lambda: signal_gradients(self.target, initial_parameters(self.target), self.task.signal))
        return sum(self.group.gathered([metagradient_flops])) - (self.group.size - 1) * repeated

    def _signal_cost(self) -> float:
        """FLOPs of one Phi, counted once: only the task knows what it computes."""
        if self._signal_flops is None:
            _, self._signal_flops = compute.counted_flops(lambda: self.task.signal(self.target))
        return self._signal_flops


def _labels_in(batches: Sequence[Mapping[str, Tensor]]) -> int:
    """Real labels of all batches: one number to wait for, not one a batch."""
    return int(sum((batch["labels"] != IGNORED_LABEL).sum() for batch in batches))
