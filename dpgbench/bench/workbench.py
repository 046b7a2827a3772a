"""What a method is handed: a generator, prompts, the target it may train, and an account that everything it does is charged to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpgbench.bench.accountant import Accountant
from dpgbench.bench.differentiating import Differentiating
from dpgbench.bench.distributed import SINGLE_PROCESS, SingleProcess
from dpgbench.bench.drawing import Drawing
from dpgbench.bench.meter import Budget, Meter
from dpgbench.core.cell import RunSpec
from dpgbench.core.plugin_types import Snapshot, TaskView
from dpgbench.metagrad import Metagradients
from dpgbench.store.checkpoints import Saved
from dpgbench.worlds.generator import Generator
from dpgbench.worlds.world import World

if TYPE_CHECKING:
    from torch import Tensor


Checkpoint = Callable[[int, Callable[[], dict[str, "Tensor"]], Callable[[], dict[str, Any]]], None]


class Workbench:
    """One cell's tools. `options` are the method's own.

    Three parts do the work, and the bench hands on what they can: `Drawing` has the generator, `Differentiating` the target, `Accountant`
    what both cost. Its own are what a method tells: notes, records, checkpoints.

    Where several processes work on the cell (`group`), every one of them has a bench and a method that takes the same steps. Metagradients
    and a policy's rollouts and updates are shared among them; anything else every process computes for itself, and it is charged once.
    """

    def __init__(
        self,
        spec: RunSpec,
        task: TaskView,
        world: World,
        generator: Generator,
        meter: Meter,
        record: Callable[[dict[str, Any]], None],
        checkpoint: Checkpoint = lambda step, tensors, numbers: None,
        group: SingleProcess = SINGLE_PROCESS,
        share_with: Callable[[Snapshot], float] = lambda snapshot: 0.0,
    ):
        self.spec, self.task, self.world, self.generator, self.meter = spec, task, world, generator, meter
        self.options = spec.method
        self._record, self._checkpoint, self._share_with, self.group = record, checkpoint, share_with, group
        self.makes_checkpoints = False
        self.tracking: Path | None = None
        """Where trackers' files go, if the method trains a policy that reports to some."""
        self.saved: Saved | None = None
        """Where the method is to go on from: what it told `checkpoint` in a run that was interrupted."""
        self._notes: dict[str, Any] = {}

        self.account = Accountant(world.target, task, meter, Budget(**spec.budget), group)
        self.spent_share, self.once = self.account.spent_share, self.account.once

        drawing = Drawing(spec.seed, world, generator, self.account)
        self.seed, self.prompts, self.sample, self.finetune = drawing.seed, drawing.prompts, drawing.sample, drawing.finetune
        self.charge_generation, self.shared_draws = drawing.charge_generation, drawing.shared_draws

        self._differentiating = target = Differentiating(spec, task, world, self.account)
        self.optimizer, self.engine = target.optimizer, target.engine
        self.batches, self.dataset_value, self.ascend = target.batches, target.dataset_value, target.ascend
        self.one_step_utilities, self.influences = target.one_step_utilities, target.influences
        self.inverse_curvature_product, self.warmed_up = target.inverse_curvature_product, target.warmed_up

    def metagradients(
        self, texts: Sequence[str], *names: object, optimizer: str | None = None, lr: float | None = None, per_token: bool = False
    ) -> Metagradients:
        """`Differentiating.metagradients`, and Phi is noted."""
        outcome = self._differentiating.metagradients(texts, *names, optimizer=optimizer, lr=lr, per_token=per_token)
        self.note(phi=float(outcome.value))
        return outcome

    def scores(self, texts: Sequence[str]) -> list[float]:
        """The task's black-box score of each text. It runs no model here, so it costs seconds but no FLOPs."""
        return list(self.task.score(texts))

    def share_with(self, snapshot: Snapshot) -> float:
        """The share of the budget that would be spent if this were the answer: 0 without a budget, above 1 if it is too much.

        For methods that spend a whole budget (`Method.budget_options`) and so ask before they answer. Its deployment dataset is drawn to
        know its price; neither its FLOPs nor its time are charged.
        """
        return self._share_with(snapshot)

    def spent(self) -> Meter:
        """What was spent up to here, to be given to `take_back`."""
        return Meter() + self.meter

    def take_back(self, spent: Meter) -> None:
        """For a step that was undone because its answer would be over the budget: no answer has anything of it, so none pays for it."""
        self.meter.restore((Meter() + spent).state())

    # ---- telling

    def note(self, **values: Any) -> None:
        """Values for the line of the step in progress."""
        self._notes |= values

    def noted(self) -> dict[str, Any]:
        """What was noted so far."""
        return dict(self._notes)

    def record(self, **line: Any) -> None:
        """One line of `metrics.jsonl`: `step`, whatever else, and what was noted since the last line."""
        line, self._notes = {**self._notes, **line}, {}
        self._record(line)

    # ---- going on after an interruption

    def checkpoint(self, step: int, tensors: Callable[[], dict[str, Tensor]], numbers: Callable[[], dict[str, Any]] = lambda: {}) -> None:
        """For methods with a state worth keeping, between a step's record and its snapshot: save it, if it is time to.

        `tensors` and `numbers` (whatever JSON can hold) are called only then, and come back as `bench.saved` in the run that goes on,
        which must first yield the snapshot of `saved.step`, if it is one that it yields, and then draw what it would have drawn. A method
        without a state of its own never calls this and starts again. Raises Interrupted where the process was asked to stop.
        """
        self.makes_checkpoints = True
        self._checkpoint(step, tensors, numbers)

    def state(self) -> dict[str, Any]:
        """What this bench remembers that later charges depend on."""
        return self.account.state()

    def restore(self, saved: Saved, state: dict[str, Any]) -> None:
        """As it was at a checkpoint."""
        self.saved = saved
        self.account.restore(state)
