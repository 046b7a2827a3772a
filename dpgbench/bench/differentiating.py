"""A method's work with the target: what texts do to it, by training on them and by differentiating Phi through that training."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dpgbench.bench.accountant import Accountant
from dpgbench.bench.engine import engine_settings, optimizer_of
from dpgbench.core.cell import RunSpec
from dpgbench.core.errors import CellError, UserError
from dpgbench.core.exchange import TaskView
from dpgbench.core.seeds import derive, torch_seeded
from dpgbench.metagrad import Metagradients, ascend, metagradients, signal_gradients
from dpgbench.metagrad.loss import initial_parameters
from dpgbench.metagrad.training import first_step_dots, gradient_dots, loaded, one_step_values, train
from dpgbench.worlds.world import World

if TYPE_CHECKING:
    from torch import Tensor

PARAMETERS_AT_ONCE = 100_000_000
REMEMBERED = 100_000  # texts whose utility is kept


class Differentiating:
    """Every answer is that of a fresh target: training starts at phi_0 and leaves it as it is."""

    def __init__(self, spec: RunSpec, task: TaskView, world: World, account: Accountant):
        self.spec, self.task, self.world, self.account = spec, task, world, account
        self.optimizer = optimizer_of(spec.training)
        self.engine = engine_settings(spec.training, data_parallel=account.group.size > 1)
        self._signal_gradient: dict[str, Tensor] | None = None
        self._utilities: dict[str, tuple[float, float]] = {}  # of texts judged before, each with its share of the seconds

    def batches(self, texts: Sequence[str], *names: object, steps: int | None = None) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The batches of `steps` (default: T) optimizer steps of the target, and for each position in them the index of its text.

        Texts are dealt out in a seeded random order, so that the completions of one prompt do not all meet in one batch.
        Raises UserError if they do not make that many batches of one size.
        """
        steps = steps or self.spec.training.inner_steps
        if len(texts) % steps or not texts:
            fix = f"make it {max(1, len(texts) // steps) * steps} texts or lower inner_steps"
            raise UserError(f"training.inner_steps={steps}: a dataset of {len(texts)} texts must divide into as many batches; {fix}")
        with torch_seeded(derive(self.spec.seed, "batches", *names)):
            order = torch.randperm(len(texts)) if steps > 1 else torch.arange(len(texts))
        encoded = self.world.encode(texts)
        parts = order.chunk(steps)
        return [{name: tensor[part.to(tensor.device)] for name, tensor in encoded.items()} for part in parts], order

    def metagradients(self, texts: Sequence[str], *names: object, optimizer: str | None = None, lr: float | None = None) -> Metagradients:
        """Train a fresh target on the texts and differentiate Phi through that run: one reward per text, in the texts' order.

        `optimizer` ("sgd", "adamw") and `lr` stand in for the target's own.

        Cost: 3TF for T batches' training, and for the reverse pass what the engine needs, between 0.3F (a metric of the head alone,
        T=1) and 2F + 9(T-1)F, counted rather than derived, because the engine skips what is structurally zero.
        Raises CellError if a reward is not finite.
        """
        training = self.spec.training
        learner = optimizer_of(training, optimizer, lr)
        batches, order = self.batches(texts, *names)

        def differentiate() -> Metagradients:
            return metagradients(self.world.target, batches, self.task.signal, learner, **self.engine.for_metagradients())

        outcome = self.account.metagradients(batches, differentiate)
        rewards = torch.empty_like(outcome.rewards)
        rewards[order.to(rewards.device)] = outcome.rewards
        if not (math.isfinite(outcome.value) and bool(rewards.isfinite().all())):
            bad = int((~rewards.isfinite()).sum())
            raise CellError(
                f"metagradients: Phi is {outcome.value:g} and {bad} of {len(texts)} rewards are not finite; "
                f"lower training.lr={training.lr} or raise training.eps_root={training.eps_root}"
            )
        return Metagradients(rewards, outcome.value, outcome.params)

    def dataset_value(self, texts: Sequence[str], *names: object) -> float:
        """Phi of a fresh target trained on the texts by T steps: one number for all of them. Cost: 3TF for T batches, and one Phi.

        Raises CellError if it is not finite, UserError if the texts do not make T batches of one size.
        """
        target = self.world.target
        batches, _ = self.batches(texts, *names)
        params = train(target, batches, self.optimizer, **self.engine.for_training())
        with loaded(target, params), torch.no_grad():
            value = float(self.task.signal(target))
        self.account.training(batches)
        self.account.signal()
        if not math.isfinite(value):
            raise CellError(f"dataset_value: Phi is {value:g} after training; lower training.lr={self.spec.training.lr}")
        return value

    def ascend(self) -> dict[str, Tensor]:
        """Where the target's own optimizer gets by following Phi itself, in as many steps as a deployment dataset would be worth.

        No text could be better, up to what weights it reaches: an anchor, not a competitor. Its cost is counted and charged as training.
        """
        steps = self.spec.scale.deployment_steps or self.spec.training.inner_steps
        return self.account.counted("training", lambda: ascend(self.world.target, self.task.signal, self.optimizer, steps))

    def one_step_utilities(self, texts: Sequence[str]) -> list[float]:
        """For each text alone: Phi of a fresh target after one step on that text. Cost: 3F and one Phi per text.

        A text that was judged before, or stands here twice, is computed once and charged each time.
        """
        known = self._utilities
        self.account.meter.remembered(sum(known[text][1] for text in texts if text in known))
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            clock, encoded = time.perf_counter(), self.world.encode(new)
            arguments = (self.world.target, encoded["input_ids"], encoded["labels"], self.task.signal, self.optimizer)
            values = one_step_values(*arguments, reduction=self.engine.reduction, chunk=self._texts_at_once()).tolist()
            each = (time.perf_counter() - clock) / len(new)
            known.update((text, (value, each)) for text, value in zip(new, values, strict=True))
        self.account.judged(self.world.encode(texts), signals=len(texts))
        found = [known[text][0] for text in texts]
        while len(known) > REMEMBERED:
            del known[next(iter(known))]
        return found

    def influences(self, texts: Sequence[str], *, optimizer_aware: bool = False) -> Tensor:
        """What one step from phi_0 on each text alone would do to Phi, to first order: <u_i, grad Phi(phi_0)>, (N,), higher is better.

        u_i is minus the text's gradient, or with `optimizer_aware` the first update that the target's optimizer makes of it. Every text
        is judged alone and at phi_0, whatever T is. Cost: 3F in either case, and once per cell Phi's gradient at phi_0, counted.
        Raises CellError if a value is not finite.
        """
        encoded = self.world.encode(texts)
        arguments = (self.world.target, encoded["input_ids"], encoded["labels"], self._gradient_of_signal())
        if optimizer_aware:
            values = first_step_dots(*arguments, self.optimizer, reduction=self.engine.reduction, chunk=self._texts_at_once())
        else:
            values = -gradient_dots(*arguments, **self.engine.for_training())
        self.account.judged(encoded)
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).sum())
            raise CellError(f"influences: {bad} of {len(texts)} are not finite; look at the task's signal at the initial target")
        return values

    def _gradient_of_signal(self) -> dict[str, Tensor]:
        """At phi_0, of the parameters that Phi reads; paid once per cell."""
        if self._signal_gradient is None:
            target = self.world.target
            _, slopes = self.account.counted(
                "scoring", lambda: signal_gradients(target, initial_parameters(target), self.task.signal), once="signal gradient"
            )
            self._signal_gradient = {name: slope for name, slope in slopes.items() if slope is not None}
        return self._signal_gradient

    def _texts_at_once(self) -> int:
        """How many texts may have copies of the parameters of their own."""
        size = sum(parameter.numel() for parameter in self.world.target.parameters())
        return max(1, min(64, PARAMETERS_AT_ONCE // size))
